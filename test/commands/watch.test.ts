import { EventEmitter, once } from 'node:events'
import { cpSync, mkdtempSync, rmSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { PassThrough } from 'node:stream'
import t from 'tap'
import { figure, LAST_STEP } from '../../src/commands/operate/watch/runs.js'
import { statusCommand } from '../../src/commands/operate/watch/status.js'
import type { RunRow } from '../../src/commands/operate/watch/survey.js'
import { topCommand } from '../../src/commands/operate/watch/top.js'
import { VERSION } from '../../src/config.js'
import { keyOf, keysFile } from '../http/keys.js'
import { flip, runFolder, start as startKeeping, stateFile } from '../keep/data-folder.js'
import { train } from '../run/trainer.js'
import { RawClient, type Service, startService, until } from '../service.js'

const SMALL = { lanes: 1, staging_bytes: 2 ** 20 }
const MODEL = { groups: [{ name: 'g', algorithm: 'sgd' }], parameters: [{ name: 'w', shape: [2], group: 'g' }] }

/** Opens a run of two numbers, and takes `steps` steps. */
async function opened(service: Service, run: string, steps = 0, more: object = {}): Promise<RawClient> {
  const client = await RawClient.connect(service.url)
  await client.open({ run, ...MODEL, ...more })
  for (let step = 1; step <= steps; step += 1) await client.step(step, [Float32Array.of(3, 4)])
  return client
}

async function status(argv: readonly string[], env: Record<string, string> = {}, width?: number) {
  let failed = false
  const text = await statusCommand(argv, env, { width, failed: () => (failed = true) })
  return { text, failed }
}

t.test('one look says what the service is, how full it is, and what its runs do', async (t) => {
  const service = await startService({ ...SMALL, max_runs: 8 })
  const empty = await status([service.http])
  t.match(
    empty.text,
    new RegExp(`^muond ${VERSION} at ${service.http}: ready, up \\d+ (s|min|h)\ncpu, ONNX Runtime .*, 1 lane\n\n`),
  )
  t.match(empty.text, /\n\nno runs$/)
  t.notOk(empty.failed)
  const clients = [await opened(service, 'first', 3), await opened(service, 'x'.repeat(128))]
  const rank = { rank: 1, world_size: 2 }
  clients.push(await opened(service, 'ranks', 0, { member: rank }))
  await clients[1]!.close()
  const { text } = await status([service.url])
  t.match(text, /^runs +3 +8 +38 %$/m, 'also by the URL of a trainer')
  t.match(text, /^connections +2 +256 +1 %$/m)
  t.match(text, /^state +8 B +[\d.]+ [GT]B +0 %$/m)
  t.match(text, /^staging +0 B +1\.05 MB +0 %$/m)
  t.match(text, /^first +training +3 +[\d.e+]+ +8 B +1\/1 +now +0$/m)
  t.match(text, /^x{128} +no trainer +0 +– +0 B +0\/1 +– +0$/m)
  t.match(text, /^ranks +waiting +0 +– +0 B +1\/2 +– +0$/m)
  for (const width of [80, 60, 24]) {
    const narrow = (await status([service.http], {}, width)).text.split('\n')
    const rows = narrow.slice(narrow.findIndex((line) => line.startsWith('run ')))
    t.ok(
      rows.every(({ length }) => length <= Math.max(width, 28)),
      'a name, the step and the rate stay',
    )
    t.match(narrow.join('\n'), /^x+…x+ +(no trainer +)?0/m)
  }
  const json = JSON.parse((await status([service.http, '--json'])).text)
  t.match(json, {
    ...{ url: service.http, version: VERSION, ready: true, uptime_seconds: Number, devices: [{ name: 'cpu' }] },
    limits: [{ name: 'runs', used: 3, limit: 8 }],
    runs: [{ name: 'first', step: 3, status: 'training', step_rate: Number, last_step_seconds: Number }],
    stored: [],
  })
  for (const client of [clients[0]!, clients[2]!]) await client.close()
  await service.app.close()
})

t.test('runs on the disk are listed, and those that cannot be read with the reason', async (t) => {
  const data = join(t.testdir({}), 'data')
  const before = await startKeeping(data)
  await (await train(before, { run: 'r', last: 5 })).client.close()
  await before.app.close()
  cpSync(runFolder(data), join(data, 'runs', 'copy'), { recursive: true })
  flip(stateFile(data), -1)
  const service = await startKeeping(data)
  await service.restored
  const { text, failed } = await status([service.http])
  t.notOk(failed)
  t.match(text, /\nno runs\n\nrun copy: unreadable: .*\nrun r: unreadable: .* has SHA-256 /)
  await service.app.close()

  const small = await startKeeping(join(t.testdir({}), 'data'), { max_runs: 1 })
  await (await opened(small, 'first', 1)).close()
  const second = await opened(small, 'second')
  t.match((await status([small.http])).text, /^first +on disk +1 +– /m)
  await second.close()
  await small.app.close()
})

t.test('a key that is not for all runs is told of its quotas', async (t) => {
  const scopes = ['step', 'read']
  const quotas = { runs: 4, bytes_per_second: 2 ** 20 }
  const keys = keysFile(t, [
    { name: 'a', scopes, runs: 'a-', quotas },
    { name: 'b', scopes: ['step'] },
    { name: 'c', scopes: ['read'], runs: 'c-' },
  ])
  const service = await startService({ ...SMALL, keys_file: keys.path })
  const { text } = await status([service.http], { MUOND_TOKEN: keyOf('a') })
  t.match(
    text,
    /: ready\ncpu, .*\n\nlimit +used +of +full\nquota of runs +0 +4 +0 %\nquota of bytes per second +0 B +1\.05 MB +0 %\n/,
  )
  t.match((await status([service.http], { MUOND_TOKEN: keyOf('c') })).text, /: ready\ncpu, .*\n\nno runs$/)
  const terminal = terminalOf({})
  await topCommand([service.http, '--count', '1'], { MUOND_TOKEN: keyOf('a') }, terminal)
  t.match(terminal.written(), /: ready\ncpu\nno runs\n\n$/)
  await t.rejects(status([service.http], { MUOND_TOKEN: keyOf('b') }), {
    name: 'ConfigError',
    message: /answers 403: /,
  })
  await t.rejects(status([service.http]), { name: 'ConfigError', message: /answers 401: a key is needed/ })
  await service.app.close()
})

t.test('a service that accepts no steps says why, and the command ends with 1', async (t) => {
  const service = await startService({ ...SMALL, drain_seconds: 30 })
  const client = await opened(service, 'r')
  client.gradient(0, 1, { values: Float32Array.of(1, 2) })
  await until(() => service.runs.get('r').begun)
  const drained = service.drain()
  await client.expect('draining')
  const path = join(mkdtempSync(join(tmpdir(), 'muond-')), 's')
  t.teardown(() => rmSync(join(path, '..'), { recursive: true }))
  await service.listenLocally(path)
  const { text, failed } = await status([`ws+unix://${path}`])
  t.ok(failed)
  t.match(text, /: NOT READY, up .*\nthe service shuts down and begins no step \(DRAINING\)\n/)
  t.match(JSON.parse((await status([`ws+unix://${path}`, '--json'])).text), { ready: false, reason: /shuts down/ })
  const terminal = terminalOf({})
  await topCommand([`ws+unix://${path}`, '--count', '1'], {}, terminal)
  t.match(terminal.written(), /\ncpu; the service shuts down and begins no step \(DRAINING\); state/)
  client.send({ type: 'end', step: 1 })
  await drained
  await t.rejects(status([service.http]), { name: 'ConfigError', message: /cannot be reached: .*ECONNREFUSED/ })
})

t.test('what is no muond, and arguments that are wrong, are one line', async (t) => {
  const other = createServer((_request, response) => response.writeHead(404).end('no')).listen(0, '127.0.0.1')
  await once(other, 'listening')
  const url = `http://127.0.0.1:${(other.address() as AddressInfo).port}`
  await t.rejects(status([url]), { name: 'ConfigError', message: /answers 404: no$/ })
  other.close()
  await t.rejects(status(['ftp://x']), { message: /^the URL is 'ftp:\/\/x', expected one such as/ })
  await t.rejects(status(['a', 'b']), { message: /^status takes one URL/ })
  t.match((await status(['--help'])).text, /^muond status \[URL\]/)
  const terminal = terminalOf({})
  t.match(await topCommand(['--help'], {}, terminal), /^muond top \[URL\]/)
  await t.rejects(topCommand(['a', 'b'], {}, terminal), { message: /^top takes one URL/ })
  for (const wrong of [['--interval', '0.01'], ['--interval=x'], ['--count', '0'], ['--count=']])
    await t.rejects(topCommand(wrong, {}, terminal), { message: /^--(interval|count) is '.*', expected a number from/ })
})

/** Standard output and input, and what was written to the one and asked of the other. */
function terminalOf(size: { isTTY?: true; columns?: number; rows?: number }) {
  const output = Object.assign(new PassThrough(), size)
  const raw: boolean[] = []
  const keyboard = Object.assign(new PassThrough(), { ...size, setRawMode: (on: boolean) => raw.push(on) })
  const signals = new EventEmitter()
  let text = ''
  output.on('data', (data) => (text += data))
  return { output, keyboard, signals, raw, written: () => text }
}

const [ESCAPE, HOME] = ['\x1b', '\x1b[H']

/** When so many pictures were drawn. */
async function drawn(terminal: ReturnType<typeof terminalOf>, pictures: number): Promise<string[]> {
  const all = () => terminal.written().split(HOME)
  while (all().length <= pictures) await once(terminal.output, 'data')
  return all().slice(1)
}

t.test('where the output is no terminal each look is a table, the fastest run first', async (t) => {
  const service = await startService(SMALL)
  const clients = [await opened(service, 'b', 30), await opened(service, 'idle'), await opened(service, 'a', 30)]
  const terminal = terminalOf({})
  await topCommand([service.http, '--count', '2', '--interval', '0.1'], {}, terminal)
  const [first, second, rest] = terminal.written().split('\n\n')
  t.equal(rest, '')
  t.match(first, new RegExp(`^muond ${VERSION} at ${service.http}: ready, up .*\ncpu; state 16 B of `))
  t.match(second, /\ncpu; 0 steps\/s; gradients 0 B\/s; updates 0 B\/s; state 16 B of /)
  const [, , head, ...rows] = second!.split('\n')
  t.match(head, /^run +status +step +steps\/s +grad norm +update RMS +phases, ms +state +members +last step$/)
  t.same(rows.map((row) => row.split(' ')[0]).sort(), ['a', 'b', 'idle'])
  t.match(rows[0], /^[ab] +training +30 +[\d.e+]+ +5 +3\.54( +[\d.e-]+){4} +8 B +1\/1 +(now|\d s ago)$/)
  t.match(rows[2], /^idle +waiting +0 +– +– +– +– +0 B +1\/1 +–$/)
  for (const client of clients) await client.close()

  const lost = terminalOf({})
  const running = topCommand([service.http, '--count', '3', '--interval', '0.1'], {}, lost)
  await once(lost.output, 'data')
  await service.app.close()
  await running
  t.match(lost.written(), /\n\nhttp:.* cannot be reached: .*ECONNREFUSED.*\n\n$/, 'it goes on asking')
  await t.rejects(topCommand([service.http], {}, lost), { name: 'ConfigError', message: /cannot be reached/ })
})

t.test('a reader that stops early ends it', async (t) => {
  const service = await startService(SMALL)
  const terminal = terminalOf({})
  const running = topCommand([service.http, '--interval', '600'], {}, terminal)
  await once(terminal.output, 'data')
  terminal.output.emit('error', new Error('EPIPE'))
  await running
  t.equal(terminal.output.listenerCount('error'), 0)
  await service.app.close()
})

t.test('a terminal is drawn in place, to its size, and left as it was', async (t) => {
  const service = await startService(SMALL)
  const clients: RawClient[] = []
  for (let i = 0; i < 12; i += 1) clients.push(await opened(service, i === 0 ? 'y'.repeat(128) : `run-${i}`, 1))
  const ends: ((terminal: ReturnType<typeof terminalOf>) => void)[] = [
    ({ keyboard }) => keyboard.write('xq'),
    ({ keyboard }) => keyboard.write('\x03'),
    ({ signals }) => signals.emit('SIGTERM'),
  ]
  for (const end of ends) {
    const terminal = terminalOf({ isTTY: true, columns: 60, rows: 10 })
    const running = topCommand([service.http, '--interval', '0.1'], {}, terminal)
    const [, picture] = await drawn(terminal, 2)
    const lines = picture!.replaceAll(`${ESCAPE}[K`, '').replaceAll(`${ESCAPE}[J`, '').split('\r\n')
    t.equal(lines.length, 10)
    t.ok(lines.every(({ length }) => length <= 60))
    t.match(lines[1], /^cpu; .*\/s$/, 'what has no room is left out, and not cut')
    t.match(lines.at(-1), '7 slower runs below; q ends')
    t.match(lines[3], /^run +step +steps\/s +grad norm/)
    terminal.output.rows = 30
    terminal.output.emit('resize')
    const tall = (await drawn(terminal, 3)).at(-1)!
    t.match(tall, /\ny+…y+ +1 /)
    t.match(tall, /\nq ends/)
    end(terminal)
    await running
    t.ok(terminal.written().startsWith(`${ESCAPE}[?1049h${ESCAPE}[?25l`))
    t.ok(terminal.written().endsWith(`${ESCAPE}[?25h${ESCAPE}[?1049l`))
    t.same(terminal.raw, [true, false])
    t.ok(terminal.keyboard.isPaused())
    t.equal(terminal.signals.listenerCount('SIGTERM'), 0)
  }
  for (const client of clients) await client.close()
  await service.app.close()
})

t.test(
  'a terminal that lost its service shows so above the last picture, and one without a size is 80 by 24',
  async (t) => {
    const service = await startService(SMALL)
    const terminal = terminalOf({ isTTY: true })
    const running = topCommand([service.http, '--interval', '0.1'], {}, terminal)
    await drawn(terminal, 1)
    await service.app.close()
    while (!terminal.written().includes('cannot be reached')) await once(terminal.output, 'data')
    terminal.keyboard.write('Q')
    await running
    const [, last] = terminal.written().split(/cannot be reached[^\n]*/)
    t.match(last, /no runs/)
  },
)

t.test('https is spoken where the URL says so', async (t) => {
  const [tls_cert, tls_key] = ['server.pem', 'server.key'].map((name) => join('test/golden/tls', name))
  const service = await startService({ ...SMALL, tls_cert: tls_cert!, tls_key: tls_key! })
  const untrusted = { name: 'ConfigError', message: /cannot be reached: .*certificate/ }
  for (const scheme of ['https', 'wss']) {
    const url = service.http.replace('http', scheme)
    await t.rejects(topCommand([url], {}, terminalOf({})), untrusted)
    await t.rejects(status([url]), untrusted)
  }
  await service.app.close()
})

t.test('numbers are short, and ages have one unit', async (t) => {
  t.same([undefined, 0, 3e-5, 0.5, 12345, 2e6].map(figure), ['–', '0', '3.00e-5', '0.5', '12300', '2.00e+6'])
  const ages = [undefined, 0.5, 3, 119, 120, 7200, 200_000]
  const shown = ages.map((last_step_seconds) => LAST_STEP.cell({ last_step_seconds } as RunRow))
  t.same(shown, ['–', 'now', '3 s ago', '119 s ago', '2 min ago', '2 h ago', '2 d ago'])
})
