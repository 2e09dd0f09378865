import { once } from 'node:events'
import {
  chmodSync,
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { createServer as createHttpServer } from 'node:http'
import { createServer } from 'node:net'
import { hostname, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import t, { type Test } from 'tap'
import { checkPort, checkSocket } from '../../src/commands/operate/check/address.js'
import { checkCommand } from '../../src/commands/operate/check/check.js'
import { checkData } from '../../src/commands/operate/check/data.js'
import { checkDevice } from '../../src/commands/operate/check/device.js'
import { checkKeys, checkPresets, checkTls } from '../../src/commands/operate/check/files.js'
import type { Finding } from '../../src/commands/operate/check/finding.js'
import { configOf, VERSION } from '../../src/config.js'
import { holderOf } from '../../src/store/lock.js'
import { keyOf, keysFile } from '../http/keys.js'
import { flip, id, manifestOf, reseal, rewrite, runFolder, start, stateFile } from '../keep/data-folder.js'
import { train, trainStep } from '../run/trainer.js'
import { startService } from '../service.js'

const QUICK = ['--device', 'cpu', '--port', '0']
const TLS = (name: string) => resolve('test/golden/tls', name)

/** What the command finds, by check, and whether it ends with 1. */
async function check(argv: readonly string[] = [], env: Record<string, string> = {}) {
  let failed = false
  const text = await checkCommand([...argv, '--json'], env, { failed: () => (failed = true) })
  const { checks } = JSON.parse(text) as { checks: Finding[] }
  t.equal(
    failed,
    checks.some(({ state }) => state === 'error'),
  )
  return { ...by(checks), failed }
}

/** Findings by what they are of. */
function by(checks: readonly Finding[]) {
  const of = (name: string) => checks.filter(({ check }) => check === name)
  return { checks, of, one: (name: string) => of(name)[0] }
}

type Settings = Parameters<typeof configOf>[0]
const dataOf = async (data: string, settings: Settings = {}) => by(await checkData(configOf({ data, ...settings })))

/** A folder whose path is short: that of a socket has at most 108 bytes. */
function shortFolder(t: Test): string {
  const folder = mkdtempSync(join(tmpdir(), 'muond-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  return folder
}

const print = (argv: readonly string[], width?: number) =>
  checkCommand([...QUICK, ...argv], {}, { width, failed: () => {} })

/** Every file below a folder. */
const filesIn = (folder: string) => readdirSync(folder, { recursive: true, encoding: 'utf8' }).sort()

t.test('without anything wrong every row is ok, and a table says so', async (t) => {
  const data = join(t.testdir({}), 'a', 'b')
  const socket = join(shortFolder(t), 's')
  const { checks, failed, one } = await check([...QUICK, '--data', data, '--socket', socket])
  t.same(
    checks.map(({ check, state }) => [check, state]),
    ['settings', 'device', 'memory', 'data', 'port', 'socket', 'keys', 'TLS', 'presets'].map((name) => [name, 'ok']),
  )
  t.notOk(failed)
  t.match(checks[0], { found: '--port, --socket, --device, --data' })
  t.match(one('socket'), { found: `${socket} is free` })
  t.match(checks[1], { found: /^cpu has computed with ONNX Runtime \d/ })
  t.match(checks[3], { found: `${data} is not there yet, and will be made` })
  const lines = (await print(['--data', data])).split('\n')
  t.match(lines[0], /^check {5}state {2}found$/)
  t.match(lines[1], /^settings {2}ok {5}--port, --device, --data$/)
  t.equal(lines.at(-1), '0 errors, 0 warnings, 8 ok')
  t.match(await print(['--help']), 'muond check [--flag value]')
})

t.test('all that is wrong with the settings is told at once, and the rest is looked at', async (t) => {
  const { of, one, failed } = await check(['--prot', '1', '--port', 'x', '--lanes=999', '--host', '0.0.0.0'], {
    ...{ MUOND_CHUNK_BYTES: '1', MUOND_PRESTES: 'p', MUOND_TOKEN: 'of a client', MUOND_DEVICE: 'cpu' },
  })
  t.ok(failed)
  const help = 'muond --help has every flag and variable'
  t.match(of('settings'), [
    { state: 'error', found: "Unknown option '--prot'", remedy: help },
    { found: "--port: must be integer, got 'x'", remedy: help },
    { found: "--lanes: must be <= 256, got '999'" },
    { found: "MUOND_CHUNK_BYTES: must be >= 4, got '1'" },
    { found: /^host is '0\.0\.0\.0' and there are no keys/, remedy: /^--keys-file \(muond keys add\), or --insecure/ },
    { found: /^host is '0\.0\.0\.0' and there is no TLS/, remedy: /^--tls-cert and --tls-key, or/ },
    { state: 'warning', found: 'MUOND_PRESTES is set, and no setting of muond' },
  ])
  t.match(one('device'), { state: 'ok' })
  for (const name of ['port', 'keys', 'TLS']) t.same(of(name), [], `nothing is said of a ${name} that is not known`)
  t.match(one('data'), { state: 'warning', remedy: '--data DIR keeps it' })
  t.match(await checkDevice(configOf({ device: 'cuda' })), [{ check: 'device', state: 'error' }])
  t.match(await checkDevice(configOf()), [{ check: 'device', found: /has computed with/ }], 'whichever there is')
  const [, memory] = await checkDevice(configOf({ device: 'cpu', state_bytes_limit: 2 ** 50 }))
  t.match(memory, { state: 'warning', found: /^1\.13 PB for the state of runs are granted, .* are there$/ })
})

t.test('beside a running service nothing is disturbed, and each run is held against its hashes', async (t) => {
  const data = join(t.testdir({}), 'data')
  const service = await start(data, { durability: 'journal' })
  const { client } = await train(service, { last: 7 })
  const { port } = new URL(service.http)
  const before = filesIn(data)
  const argv = ['--device', 'cpu', '--port', port, '--data', data]
  const { one, failed } = await check(argv)
  t.notOk(failed)
  t.match(one('port'), { state: 'warning', found: `127.0.0.1:${port} is in use: muond ${VERSION} listens there` })
  t.match(one('data'), { state: 'warning', found: new RegExp(`is in use by process ${process.pid} on `) })
  t.match(one('disk'), { state: 'ok', found: /^[\d.]+ [GMT]B are free$/ })
  const stored = `step 7; ${id(5)}, the newest of 2 (`
  t.equal(one('run r')?.found.startsWith(stored), true, one('run r')?.found)
  t.match(one('run r'), { state: 'ok', found: /, 2 steps in the journal: as written$/ })
  t.same(filesIn(data), before, 'no file is new, and none is gone')
  t.match(await trainStep(client, 8), { step: 8, durable: true }, 'the service goes on')
  const everywhere = configOf({ host: '0.0.0.0', port, insecure_no_keys: true, insecure_no_tls: true })
  t.match(await checkPort(everywhere), [
    { state: 'warning', found: `0.0.0.0:${port} is in use: muond ${VERSION} listens there` },
  ])
  t.match(await checkKeys(everywhere), [
    { state: 'warning', found: 'none: whoever reaches the service may do everything' },
  ])
  t.match(await checkTls(everywhere, Date.now()), [{ state: 'warning', remedy: '--tls-cert and --tls-key' }])
  await client.close()
  await service.app.close()
  t.match((await dataOf(data)).one('data'), { state: 'ok', found: /nobody uses it; the last was process \d+ on / })
  const full = { durability: 'journal', journal_bytes: Number.MAX_SAFE_INTEGER }
  t.match((await dataOf(data, full)).one('disk'), {
    state: 'warning',
    found: /are free; the next checkpoint of each run takes [\d.]+ kB, journals up to 9\.01 PB$/,
  })
})

t.test('what a start could not bring back is an error that names the file', async (t) => {
  const data = join(t.testdir({}), 'data')
  const service = await start(data, { durability: 'journal' })
  const { client } = await train(service, { last: 7 })
  await client.close()
  await (await train(service, { run: 'fresh', last: 0 })).client.close()
  await service.app.close()
  const folder = runFolder(data)
  const state = stateFile(data)
  const journal = join(folder, 'journal', readdirSync(join(folder, 'journal')).at(-1)!)
  const pristine = new Map(
    [state, journal, manifestOf(data, 5), join(folder, 'run.json')].map((path) => [path, readFileSync(path)]),
  )
  const damages: [() => void, RegExp][] = [
    [() => flip(manifestOf(data, 5), 9), /manifest\.json has SHA-256/],
    [() => flip(state, -1), /state-00001-of-.* has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/],
    [() => rmSync(state), /state-00001-of-.* cannot be opened: ENOENT/],
    [() => flip(journal, 20), /journal.*record 1 at byte 0 is damaged, and step \d was finished after it$/],
    [() => rewrite(join(folder, 'run.json'), '"epoch": 1', '"epoch": 2'), /run\.json has SHA-256/],
  ]
  for (const [damage, found] of damages) {
    damage()
    t.match((await dataOf(data)).one('run r'), { state: 'error', found, remedy: /^a start goes on without this run/ })
    for (const [path, bytes] of pristine) writeFileSync(path, bytes)
  }
  t.match((await dataOf(data)).one('run r'), { state: 'ok' })
  rmSync(join(runFolder(data, 'fresh'), 'journal'), { recursive: true })
  t.match((await dataOf(data)).one('run fresh'), {
    state: 'ok',
    found: new RegExp(`^step 0; ${id(0)}, the newest of 1 `),
  })

  const runs = join(data, 'runs')
  mkdirSync(join(runs, '.deleted-1'))
  mkdirSync(join(runs, 'unfinished', 'journal'), { recursive: true })
  mkdirSync(join(runs, 'made'))
  mkdirSync(join(runs, 'headless', 'journal'), { recursive: true })
  copyFileSync(journal, join(runs, 'headless', 'journal', '000000000001.journal'))
  symlinkSync(folder, join(runs, 'link'))
  writeFileSync(join(runs, 'note.txt'), 'a file')
  const { checks } = await dataOf(data)
  t.match(
    checks.filter(({ check }) => check.startsWith('run ')),
    [
      { check: 'run fresh', state: 'ok' },
      { check: 'run headless', state: 'error', found: /has a journal and no checkpoint that it goes on from$/ },
      { check: 'run link', state: 'error', found: /is a symbolic link/ },
      { check: 'run made', state: 'ok', found: /^its making was interrupted/ },
      { check: 'run note.txt', state: 'error', found: /ENOTDIR/ },
      { check: 'run r', state: 'ok' },
      { check: 'run unfinished', state: 'ok', found: /^its making was interrupted/ },
    ],
  )
})

t.test('a tensor that the checkpoint lacks, or has in another shape, is an error', async (t) => {
  const data = join(t.testdir({}), 'data')
  const service = await start(data)
  const { client } = await train(service, { last: 5 })
  await client.close()
  await service.app.close()
  const changes: [(parameter: { name: string; shape: readonly number[] }) => object, RegExp][] = [
    [({ name }) => ({ name: `${name}2` }), /step-000000000005 has no tensor 'state\.m2\.momentum_buffer'$/],
    [
      ({ shape }) => ({ shape: shape.toReversed() }),
      /'state\.m\.momentum_buffer' is F32 \[24,16\], expected F32 \[16,24\]$/,
    ],
  ]
  t.match((await dataOf(data)).one('run r'), { state: 'ok', found: /\): as written$/ })
  const path = manifestOf(data, 5)
  const pristine = readFileSync(path)
  for (const [change, found] of changes) {
    reseal(data, ({ parameters: [first, ...rest] }) => ({ parameters: [{ ...first!, ...change(first!) }, ...rest] }))
    t.match((await dataOf(data)).one('run r'), { state: 'error', found })
    writeFileSync(path, pristine)
  }
})

t.test('a folder that cannot be written is an error', async (t) => {
  const file = join(t.testdir({ file: '' }), 'file')
  const cases: [string, RegExp][] = [
    ['/proc', /^\/proc cannot be written: /],
    [file, /file cannot be written: ENOTDIR/],
    [join(file, 'below'), /below cannot be made: .*file is no folder$/],
  ]
  for (const [data, found] of cases) t.match((await dataOf(data)).of('data'), [{ state: 'error', found }])
})

t.test('whether a process of another host or container holds the lock cannot be seen', async (t) => {
  const data = t.testdir({ lock: `process 1 on ${hostname()}-2 since yesterday\n` })
  t.match(holderOf(data), { holds: 'unknown' })
  t.match((await dataOf(data)).one('data'), {
    state: 'ok',
    found: /whether process 1 on .* since yesterday still uses it cannot be seen from here$/,
  })
})

t.test('a port or a socket that another program has is an error', async (t) => {
  const folder = shortFolder(t)
  const foreign = createServer((socket) => socket.resume().end('220 mail\r\n')).listen(0, '127.0.0.1')
  await once(foreign, 'listening')
  const { port } = foreign.address() as { port: number }
  const taken = [{ state: 'error', found: `127.0.0.1:${port} is in use: another program listens there` }]
  t.match(await checkPort(configOf({ port })), taken)
  foreign.close()
  await once(foreign, 'close')
  t.match(await checkPort(configOf({ port })), [{ state: 'ok', found: `127.0.0.1:${port} is free` }])
  t.match(await checkPort(configOf({ host: '::1', port })), [{ found: /^(\[::1\]:\d+ is free|.*EADDRNOTAVAIL.*)$/ }])
  const web = createHttpServer((_request, response) => response.end('{"name":"other"}')).listen(port, '127.0.0.1')
  await once(web, 'listening')
  t.match(await checkPort(configOf({ port })), taken, 'also where it speaks JSON')
  web.closeAllConnections()
  web.close()
  const elsewhere = configOf({ host: '192.0.2.1', insecure_no_keys: true, insecure_no_tls: true })
  t.match(await checkPort(elsewhere), [{ state: 'error', found: /EADDRNOTAVAIL/ }])

  const path = join(folder, 's')
  const socket = async (path: string) => (await checkSocket(configOf({ socket: path })))[0]
  t.match(await socket(path), { state: 'ok', found: `${path} is free` })
  const service = await startService({ lanes: 1 })
  await service.listenLocally(path)
  t.match(await socket(path), { state: 'warning', found: `${path} is in use: muond ${VERSION} listens there` })
  await service.app.close()
  const server = createServer((socket) => socket.destroy()).listen(path)
  await once(server, 'listening')
  t.match(await socket(path), { state: 'error', found: /another program listens there$/ })
  server.close()
  await once(server, 'close')
  await leaveStale(path)
  t.match(await socket(path), { state: 'ok', found: `${path} is one that an ended service has left` })
  unlinkSync(path)
  writeFileSync(path, '')
  t.match(await socket(path), { state: 'error', found: /is a file of another kind, which stays$/ })
  t.match(await socket(join(folder, 'no', 's')), { state: 'error', found: /^none can be made in .*no: ENOENT/ })
  t.match(await socket('x'.repeat(104)), { state: 'error', found: /has 104 bytes, at most 103$/ })
})

/** A server that has ended without removing its socket. */
async function leaveStale(path: string): Promise<void> {
  const server = createServer().listen(`${path}.moved`)
  await once(server, 'listening')
  renameSync(`${path}.moved`, path)
  server.close()
  await once(server, 'close')
}

t.test('keys are counted, and their file is one that nobody else may write', async (t) => {
  const { path } = keysFile(t, [{ name: 'a', scopes: ['read'] }])
  const keys = async (settings: Settings) => (await checkKeys(configOf(settings)))[0]
  t.match(await keys({ keys_file: path }), { state: 'ok', found: `1 key in ${path}` })
  const api_keys = `${keyOf('b')},${keyOf('c')}`
  t.match(await keys({ api_keys }), { state: 'ok', found: '2 keys in MUOND_API_KEYS' })
  t.match(await keys({ keys_file: path, api_keys }), { found: `1 key in ${path}, 2 keys in MUOND_API_KEYS` })
  chmodSync(path, 0o660)
  t.match(await keys({ keys_file: path }), { state: 'warning', found: /mode 660: its group may add a key$/ })
  chmodSync(path, 0o666)
  t.match(await keys({ keys_file: path }), { state: 'error', found: /everybody may add a key/ })
  t.match(await keys({ keys_file: `${path}.no` }), { state: 'error', found: /cannot be read: ENOENT/ })
})

t.test('certificates are read, and their ends and the mode of the key are told', async (t) => {
  const folder = t.testdir({ none: 'no certificate' })
  const [cert, key] = ['c.pem', 'c.key'].map((name) => join(folder, name)) as [string, string]
  copyFileSync(TLS('server.pem'), cert)
  copyFileSync(TLS('server.key'), key)
  chmodSync(key, 0o600)
  const settings = { tls_cert: cert, tls_key: key, tls_client_ca: TLS('ca.pem') }
  const at = (time: number, more: object = {}) => checkTls(configOf({ ...settings, ...more }), time)
  const now = Date.parse('2027-01-01')
  const [whole, file, clients] = await at(now)
  t.match(whole, {
    check: 'TLS',
    state: 'ok',
    found: /^certificate CN=server of .* ends on \d{4}-\d\d-\d\d, in \d+ days$/,
  })
  t.match(
    [file, clients],
    [
      { check: 'TLS key', state: 'ok' },
      { check: 'TLS clients', state: 'ok' },
    ],
  )
  const end = Date.parse(/ends on (\S+),/.exec(whole!.found)![1]!)
  t.match(await at(end - 20 * 86_400_000), [{ state: 'warning', remedy: 'renew it, and send the service SIGHUP' }])
  t.match(await at(end + 2 * 86_400_000), [{ state: 'error', found: /has ended on/ }])
  t.match(await at(0), [{ state: 'error', found: /holds from \d{4}-\d\d-\d\d on$/ }])
  chmodSync(key, 0o644)
  t.match((await at(now))[1], { state: 'warning', remedy: `chmod 600 ${key}` })
  t.match(await at(now, { tls_client_ca: join(folder, 'none') }), [
    {},
    {},
    { state: 'error', found: /has no certificate/ },
  ])
  t.match(await at(now, { tls_key: TLS('client.key') }), [{ state: 'error', found: /cannot be used/ }])
  t.equal((await at(now, { tls_client_ca: '' })).length, 2)
  const service = await startService({ lanes: 1, ...settings, tls_client_ca: '' })
  const port = Number(new URL(service.http).port)
  t.match(await checkPort(configOf({ ...settings, port })), [{ state: 'warning', found: / is in use: muond / }])
  await service.app.close()
  const mutual = await checkKeys(configOf({ ...settings, host: '0.0.0.0' }))
  t.match(mutual, [{ state: 'ok', found: 'none: each client certificate may do everything' }])
})

t.test('presets of one’s own are read', async (t) => {
  const folder = t.testdir({})
  copyFileSync('presets/torch.yaml', join(folder, 'mine.yaml'))
  const presets = async () => (await checkPresets(configOf({ presets: folder })))[0]
  t.match(await presets(), { state: 'ok', found: new RegExp(`^\\d+ and 1 of ${folder}$`) })
  writeFileSync(join(folder, 'mine.yaml'), 'description: 1')
  t.match(await presets(), { state: 'error', found: /mine\.yaml/ })
})

t.test('in a terminal the table is folded to its width, and long names of runs are shortened', async (t) => {
  const data = join(t.testdir({}), 'data')
  const runs = join(data, 'runs')
  for (const name of ['short', 'x'.repeat(128)]) mkdirSync(join(runs, name), { recursive: true })
  for (const width of [80, 120]) {
    const lines = (await print(['--data', data], width)).split('\n')
    for (const line of lines.filter((line) => !line.includes(data))) t.ok(line.length <= width, line)
    t.match(lines.join('\n'), /^run x+…x+ +ok +its making was interrupted/m)
  }
})

t.test('without flags a terminal is told of the defaults', async (t) => {
  const text = await checkCommand([], {}, { width: 80, failed: () => {} })
  t.match(text, /^settings +ok +the defaults$/m)
  t.match(text, /^data +warning +no folder: state ends with the process\n +→ --data DIR keeps it$/m)
})
