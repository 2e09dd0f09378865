import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { open as openFile, readFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface, type Interface } from 'node:readline'
import type { Readable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { VERSION } from '../../src/config.js'
import { bearer, keysFile } from './keys.js'
import { GRADIENTS, openRun } from './service.js'

const SERVER = fileURLToPath(new URL('../../src/server.js', import.meta.url))
const SMALL = ['--port', '0', '--device', 'cpu', '--lanes', '1', '--staging-bytes', '1048576']

type Process = ChildProcessByStdio<null, Readable, Readable>

/** Nobody listens there. */
const NOBODY = 'http://127.0.0.1:1'

function start(argv: string[], env: Record<string, string> = {}): Process {
  return spawn(process.execPath, [SERVER, ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, ...env },
  })
}

/** The output of a process until it ends, and its exit code. */
async function result(child: Process) {
  const [out, err, [code]] = await Promise.all([child.stdout.toArray(), child.stderr.toArray(), once(child, 'exit')])
  return { code, out: Buffer.concat(out).toString(), err: Buffer.concat(err).toString() }
}

/** The service as a process: its first log line, and the later ones. */
async function serve(t: { teardown(fn: () => void): void }, argv: string[] = [], env: Record<string, string> = {}) {
  const child = start([...SMALL, ...argv], env)
  t.teardown(() => child.kill('SIGKILL'))
  const lines = createInterface(child.stdout)
  const next = logEvents(lines)
  return { child, first: await next(), next }
}

function logEvents(lines: Interface) {
  const iterator = lines[Symbol.asyncIterator]()
  return async () => JSON.parse((await iterator.next()).value)
}

t.test('--version and --help print and exit', async (t) => {
  t.same(await result(start(['--version'])), { code: 0, out: `${VERSION}\n`, err: '' })
  t.match(await result(start(['--help'])), { code: 0, out: /^muond .*--host +MUOND_HOST +127\.0\.0\.1 /s, err: '' })
})

t.test('serve is what muond does without a command; the other commands print and exit', async (t) => {
  t.same(await result(start(['serve', '--version'])), { code: 0, out: `${VERSION}\n`, err: '' })
  t.match(await result(start(['presets'])), { code: 0, out: /^preset +algorithm +description\n(.*\n){7}$/, err: '' })
  const keys = `${t.testdir({ 'keys.yaml': 'keys: []' })}/keys.yaml`
  t.match(await result(start(['keys', 'list', '--file', keys])), { code: 0, err: '' })
  const open = { groups: [{ name: 'g', algorithm: 'sgd' }], parameters: [{ name: 'w', shape: [2], group: 'g' }] }
  const file = `${t.testdir({ 'open.json': JSON.stringify(open) })}/open.json`
  const explained = {
    code: 0,
    out: /^group g: sgd, .*\nin all: .* 2 elements, 8 B of state, 14 FLOPs per step\n$/s,
    err: '',
  }
  t.match(await result(start(['explain', file])), explained)
  const wrong = await result(start(['check', '--device', 'cpu', '--port', 'x']))
  t.match(wrong, { code: 1, out: /^check .*\nsettings +error +--port: must be integer, got 'x'\n/, err: '' })
  const folder = t.testdir({ 'torch.yaml': 'description: 5' })
  const cases: [string[], RegExp][] = [
    [['train'], /^muond: there is no command 'train', expected one of serve, presets, .*\n$/],
    [['status', NOBODY], /^muond: http:.* cannot be reached: .*\n$/],
    [['top', NOBODY], /^muond: http:.* cannot be reached: .*\n$/],
    [['presets', 'nobody'], /^muond: there is no preset 'nobody', expected one of .*\n$/],
    [['explain', 'nowhere.json'], /^muond: nowhere\.json cannot be read: ENOENT.*\n$/],
    [['export', 'r', '--to', 'msgpack'], /^muond: --to is 'msgpack', expected one of .*\n$/],
    [['import', 'r', 'f', '--from', 'memory'], /^muond: --from is 'memory', expected one of .*\n$/],
    [['serve', ...SMALL, '--presets', folder], /^muond: .*\/torch\.yaml: description is 5, expected a text\n$/],
  ]
  for (const [argv, message] of cases) {
    t.match(await result(start(argv)), { code: 1, out: '', err: message }, argv.join(' '))
  }
})

t.test('a reader that has seen enough of a text, as head has, is no error', async (t) => {
  const parameters = Array.from({ length: 3000 }, (_, i) => ({ name: `w${i}`, shape: [2], group: 'g' }))
  const open = { groups: [{ name: 'g', algorithm: 'sgd' }], parameters }
  const child = start(['explain', `${t.testdir({ 'open.json': JSON.stringify(open) })}/open.json`])
  child.stdout.destroy()
  const [errors, exit] = await Promise.all([child.stderr.toArray(), once(child, 'exit')])
  t.same([Buffer.concat(errors).toString(), exit], ['', [0, null]])
})

t.test('a text that cannot be written is one line and exit code 1', async (t) => {
  const full = await openFile('/dev/full', 'w')
  const child = spawn(process.execPath, [SERVER, 'presets'], { stdio: ['ignore', full.fd, 'pipe'] })
  const [errors, exit] = await Promise.all([child.stderr!.toArray(), once(child, 'exit')])
  t.same([Buffer.concat(errors).toString(), exit], ['muond: ENOSPC: no space left on device, write\n', [1, null]])
  await full.close()
})

t.test('a Unix socket is listened on beside the address, and said to be', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'muond-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const path = join(folder, 'm.sock')
  const { child, first } = await serve(t, [], { MUOND_SOCKET: path })
  t.match(first, { event: 'listening', socket: path })
  t.match(await result(start([...SMALL, '--socket', path])), {
    code: 1,
    err: `muond: socket '${path}' is in use: another service listens there\n`,
  })
  child.kill('SIGTERM')
  await once(child, 'exit')
  t.notOk(existsSync(path))
})

t.test('a start that cannot succeed is one line and exit code 1', async (t) => {
  const taken = createServer().listen(0, '127.0.0.1')
  await once(taken, 'listening')
  t.teardown(() => taken.close())
  const address = taken.address()
  const port = typeof address === 'object' ? String(address?.port) : ''
  const cases: [string[], Record<string, string>, RegExp][] = [
    [['--prot', '1'], {}, /^muond: Unknown option '--prot' \(--help lists the flags\)\n$/],
    [
      ['--prot', '1'],
      { MUOND_LANES: 'many' },
      /^muond: Unknown option '--prot' .*\nmuond: MUOND_LANES: must be integer, got 'many'\n$/,
    ],
    [[...SMALL, '--keys-file', '/nowhere'], {}, /^muond: key file '\/nowhere' cannot be read: ENOENT.*\n$/],
    [[...SMALL, '--tls-cert', '/nowhere', '--tls-key', '/nowhere'], {}, /^muond: tls_cert '\/nowhere' cannot be read/],
    [
      [...SMALL, '--port', port],
      {},
      new RegExp(`^muond: listen EADDRINUSE: address already in use 127.0.0.1:${port}\n$`),
    ],
    [[...SMALL, '--data', `${SERVER}/state`], {}, /^muond: data folder '.*server\.js\/state' is not writable: .*\n$/],
    [[...SMALL, '--device', 'cuda'], {}, /^muond: device cuda is not usable: .*\n$/],
    [[...SMALL, '--onnxruntime-dir', '/nowhere'], {}, /^muond: .*\/nowhere.*\n$/],
  ]
  for (const [argv, env, message] of cases) {
    t.match(await result(start(argv, env)), { code: 1, out: '', err: message }, argv.join(' '))
  }
})

t.test('the first log line names the address, and a signal ends the service once its step has ended', async (t) => {
  const folder = `${t.testdir()}/state`
  const { child, first, next } = await serve(t, ['--data', folder], { MUOND_PROT: '1' })
  t.match(first, { event: 'listening', address: /^http:\/\/127\.0\.0\.1:\d+$/, device: 'cpu' })
  t.match(await next(), { event: 'unknown_variables', names: ['MUOND_PROT'] })
  const trainer = await openRun(first.address, 'a')
  trainer.sendStep(1, GRADIENTS.slice(0, 1))
  t.match(await trainer.next('error'), { code: 'STEP_INCOMPLETE' })
  child.kill('SIGTERM')
  t.match(await trainer.next('draining'), { deadline_seconds: 30 })
  const closed = once(trainer.socket, 'close')
  t.match(await trainer.step(1, GRADIENTS), { step: 1, applied: 3 })
  t.equal((await closed)[0], 1012)
  t.same(await once(child, 'exit'), [0, null])
})

/** A service that drains: a step of its run was acknowledged, and another is in flight. */
async function draining(t: { teardown(fn: () => void): void }, argv: string[]) {
  const { child, first, next } = await serve(t, argv)
  const trainer = await openRun(first.address, 'a')
  await trainer.step(1, GRADIENTS)
  trainer.sendStep(2, GRADIENTS.slice(0, 1))
  await trainer.next('error')
  const event = async (name: string) => {
    for (;;) {
      const entry = await next()
      if (entry.event === name) return entry
    }
  }
  child.kill('SIGTERM')
  t.teardown(() => trainer.socket.terminate())
  await trainer.next('draining')
  return { child, trainer, event }
}

t.test('a second signal ends the process at once, and says which acknowledged steps are lost', async (t) => {
  const folder = t.testdir()
  const cases: [string[], object[]][] = [
    [['--data', `${folder}/checkpoints`], [{ run: 'a', step: 1, durable_step: 0 }]],
    [['--data', `${folder}/journal`, '--durability', 'journal'], []],
    [[], []],
  ]
  for (const [argv, lost] of cases) {
    const { child, event } = await draining(t, argv)
    child.kill('SIGINT')
    t.same((await event('ended')).lost, lost)
    t.same(await once(child, 'exit'), [1, null])
  }
})

t.test('the same signal twice in a moment, as npm hands Ctrl-C on, is one', async (t) => {
  const folder = `${t.testdir()}/state`
  const { child, first } = await serve(t, ['--data', folder])
  const trainer = await openRun(first.address, 'a')
  await trainer.step(1, GRADIENTS)
  trainer.sendStep(2, GRADIENTS.slice(0, 1))
  await trainer.next('error')
  child.kill('SIGINT')
  await trainer.next('draining')
  child.kill('SIGINT')
  t.match(await trainer.step(2, GRADIENTS), { step: 2 })
  t.same(await once(child, 'exit'), [0, null])
})

t.test('SIGHUP has keys read again where they are in a file, and ends a service without files', async (t) => {
  const entries = [
    { name: 'a', scopes: ['step'] },
    { name: 'b', scopes: ['step'] },
  ]
  const file = keysFile(t, entries)
  const { child, first, next } = await serve(t, ['--keys-file', file.path])
  t.match(await next(), { event: 'state_not_durable' })
  const trainer = await openRun(first.address, 'r', { headers: bearer('a') })
  t.match(await next(), { event: 'run_opened', key: 'a' })
  file.write(entries.slice(1))
  const closed = once(trainer.socket, 'close')
  child.kill('SIGHUP')
  t.match(await next(), { event: 'refused', code: 'UNAUTHORIZED', reason: "the key 'a' was removed" })
  t.match(await next(), { event: 'reloaded', keys: 1 })
  t.equal((await closed)[0], 1008)
  file.write([{ name: 'b', scopes: ['write'] }])
  child.kill('SIGHUP')
  t.match(await next(), { event: 'reload_failed', reason: /scopes\[0\] is "write"/ })
  child.kill('SIGTERM')
  t.same(await once(child, 'exit'), [0, null])
  const plain = await serve(t)
  plain.child.kill('SIGHUP')
  t.same(await once(plain.child, 'exit'), [0, null])
})

t.test('device auto says why it took the cpu', async (t) => {
  const { child, first, next } = await serve(t, ['--device', 'auto'])
  t.match(first, { event: 'listening', device: 'cpu' })
  t.match(await next(), { event: 'device_chosen', device: 'cpu', reason: /cuda/i })
  t.match(await next(), { event: 'state_not_durable', reason: /no data folder/ })
  child.kill('SIGINT')
  t.same(await once(child, 'exit'), [0, null])
})

t.test('a bug is logged whole and ends the process with exit code 1', async (t) => {
  const bug = 'process.on("SIGWINCH", () => { throw new Error("an accident") })'
  const { child, next } = await serve(t, [], {
    NODE_OPTIONS: `--import ${JSON.stringify(`data:text/javascript,${encodeURI(bug)}`)}`,
  })
  t.match(await next(), { event: 'state_not_durable' })
  child.kill('SIGWINCH')
  t.match(await next(), { level: 60, event: 'crashed', err: { message: 'an accident', stack: /at / } })
  t.same(await once(child, 'exit'), [1, null])
})

t.test('the program can be run by its name', async (t) => {
  t.match(await readFile(SERVER, 'utf8'), /^#!\/usr\/bin\/env node\n/)
})
