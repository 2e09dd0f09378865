import { once } from 'node:events'
import { type IncomingMessage, request } from 'node:http'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { WebSocket } from 'ws'
import { SCOPES } from '../../src/access/principal.js'
import { connect as connectClient } from '../../src/client/client.js'
import type { components } from '../../src/http/openapi.js'
import { RawClient } from '../service.js'
import { bearer, keyOf, keysFile } from './keys.js'
import { connect, GRADIENTS, MODEL, openRun, startService } from './service.js'

type Quotas = components['schemas']['Capabilities']['quotas']
/** MODEL has a muon matrix of 6, adamw of 3 and sgd with momentum of 4 elements. */
const STATE_BYTES = 4 * (6 + 2 * 3 + 4)
const OPEN = { type: 'open', protocol: 1, ...MODEL } as const

async function started(test: Test, quotas: Record<string, number>, settings: object = {}) {
  const entries = (quotas: Record<string, number>) => [
    { name: 'root', scopes: [...SCOPES] },
    { name: 'alice', scopes: [...SCOPES], runs: 'alice-', quotas },
  ]
  const file = keysFile(test, entries(quotas))
  const service = await startService(test, { keys_file: file.path, ...settings })
  const call = (path: string, { key = 'alice', method = 'GET' } = {}) =>
    fetch(`${service.url}${path}`, { method, headers: bearer(key) })
  const shown = async (key = 'alice') => {
    const { quotas } = (await (await call('/v1/capabilities', { key })).json()) as { quotas: Quotas }
    return quotas
  }
  const reload = (quotas: Record<string, number>) => {
    file.write(entries(quotas))
    service.reload()
  }
  const open = (run: string, key = 'alice') => openRun(service.url, run, { headers: bearer(key) })
  return { ...service, call, shown, reload, open, file }
}

t.test('a key makes so many runs, of so many parameters and bytes, and no more', async (t) => {
  const cases: [Record<string, number>, RegExp][] = [
    [{ runs: 1 }, /^with run 'alice-2' the key 'alice' has 2 runs, its quota is 1: delete a run .*quotas\.runs/],
    [{ parameters: 5 }, /has 6 parameters, its quota is 5: .*quotas\.parameters/],
    [{ state_bytes: 2 * STATE_BYTES - 1 }, /has 128 bytes of state, its quota is 127: .*quotas\.state_bytes/],
  ]
  const service = await started(t, {})
  for (const [quotas, message] of cases) {
    service.reload(quotas)
    const first = await service.open('alice-1')
    const second = await connect(service.url, { headers: bearer('alice') })
    second.send({ ...OPEN, run: 'alice-2' })
    t.match(await second.next('error'), { code: 'OVER_CAPACITY', status: 507, message })
    const root = await service.open('root-1', 'root')
    t.match(await service.shown('root'), { runs: { used: 2 }, parameters: { used: 6 } })
    t.match(await service.shown(), { runs: { used: 1 }, parameters: { used: 3 }, state_bytes: { used: STATE_BYTES } })
    t.match(await service.shown(), Object.fromEntries(Object.entries(quotas).map(([kind, quota]) => [kind, { quota }])))
    t.equal((await service.call('/v1/runs/alice-1', { method: 'DELETE' })).status, 204)
    second.send({ ...OPEN, run: 'alice-2' })
    t.match(await second.next('opened'), { step: 0 }, 'there is room again')
    for (const name of ['alice-2', 'root-1'])
      t.equal((await service.call(`/v1/runs/${name}`, { key: 'root', method: 'DELETE' })).status, 204)
    for (const { socket } of [first, second, root]) socket.close()
  }
})

t.test(
  'runs on the disk count, are listed with their bytes, and one that begins at a checkpoint counts, too',
  async (t) => {
    const data = join(t.testdir({}), 'data')
    const service = await started(t, { runs: 2 }, { data, max_runs: 1 })
    const trainer = await service.open('alice-1')
    await trainer.step(1, GRADIENTS)
    trainer.send({ type: 'checkpoint', tag: 'first' })
    await trainer.next('checkpointed')
    trainer.socket.close()
    await once(trainer.socket, 'close')
    const root = await service.open('root-1', 'root')
    const { runs } = (await (await service.call('/v1/runs')).json()) as { runs: object[] }
    t.match(runs, [{ name: 'alice-1', in_memory: false, state_bytes: STATE_BYTES }])
    t.match(await service.shown(), { runs: { used: 1, quota: 2 }, state_bytes: { used: STATE_BYTES } })
    root.socket.close()
    await once(root.socket, 'close')
    const from = { run: 'alice-1', checkpoint: 'first' }
    const branch = await connect(service.url, { headers: bearer('alice') })
    branch.send({ type: 'open', protocol: 1, run: 'alice-2', from })
    t.match(await branch.next('opened'), { step: 1 })
    const another = await connect(service.url, { headers: bearer('alice') })
    another.send({ type: 'open', protocol: 1, run: 'alice-3', from })
    t.match(await another.next('error'), { code: 'OVER_CAPACITY', message: /has 3 runs, its quota is 2/ })
    t.match(await service.shown(), { runs: { used: 2 }, state_bytes: { used: 2 * STATE_BYTES } })
    for (const { socket } of [branch, another]) socket.close()
    await service.app.close()

    const again = await startService(t, { keys_file: service.file.path, data, max_runs: 1 })
    await again.restored
    const response = await fetch(`${again.url}/v1/capabilities`, { headers: bearer('alice') })
    const { quotas } = (await response.json()) as { quotas: Quotas }
    t.match(quotas, { runs: { used: 2 }, state_bytes: { used: 2 * STATE_BYTES } }, 'after a restart')
  },
)

t.test('of two that make runs at once only one finds the last place', async (t) => {
  const service = await started(t, { runs: 1 })
  const url = `${service.url.replace('http', 'ws')}/v1/stream`
  const clients = await Promise.all([1, 2].map(() => RawClient.connect(url, { headers: bearer('alice') })))
  for (const [i, client] of clients.entries()) client.send({ ...OPEN, run: `alice-${i}` })
  const answers = await Promise.all(clients.map((client) => client.next()))
  t.same(answers.map(({ type }) => type).sort(), ['error', 'opened'])
  t.match(
    answers.find(({ type }) => type === 'error'),
    { code: 'OVER_CAPACITY' },
  )
  t.match(await service.shown(), { runs: { used: 1 } })
  for (const client of clients) await client.close()
})

t.test('a key has so many connections, event streams among them', async (t) => {
  const service = await started(t, { connections: 2 })
  const trainer = await service.open('alice-1')
  const events = request(`${service.url}/v1/runs/alice-1/events`, { headers: bearer('alice'), agent: false }).end()
  const [response] = (await once(events, 'response')) as [IncomingMessage]
  t.match(await service.shown(), { connections: { used: 2, quota: 2 } })
  const more = await service.call('/v1/runs/alice-1/events')
  t.match(
    [more.status, await more.json()],
    [
      429,
      {
        code: 'OVERLOADED',
        detail: "the key 'alice' has 2 connections, its quota is 2: close one, or raise quotas.connections of the key",
        retry_after_seconds: 1,
      },
    ],
  )
  const socket = new WebSocket(`${service.url.replace('http', 'ws')}/v1/stream`, { headers: bearer('alice') })
  socket.on('error', () => {})
  const [, refused] = await once(socket, 'unexpected-response')
  t.equal(refused.statusCode, 429)
  socket.terminate()
  const other = await service.open('root-1', 'root')
  other.socket.close()
  response.destroy()
  events.destroy()
  while ((await service.shown()).connections.used > 1) await new Promise(setImmediate)
  const second = await service.open('alice-2')
  for (const { socket } of [trainer, second]) socket.close()
})

t.test(
  'a stream that sends more bytes a second than its key or all may is read later, and loses nothing',
  async (t) => {
    const LIMIT = 2 ** 20
    const gradient = new Float32Array(2 ** 18).fill(0.5)
    const open = {
      groups: [{ name: 'g', algorithm: 'sgd' }],
      parameters: [{ name: 'w', shape: [gradient.length], group: 'g' }],
    }
    for (const [quotas, settings] of [
      [{ bytes_per_second: LIMIT }, {}],
      [{}, { max_bytes_per_second: LIMIT }],
    ] as const) {
      const service = await started(t, { ...quotas }, settings)
      const trainer = await connect(service.url, { headers: bearer('alice') })
      trainer.send({ type: 'open', protocol: 1, run: 'alice-1', ...open })
      await trainer.next('opened')
      const before = performance.now()
      for (const step of [1, 2]) t.match(await trainer.step(step, [gradient]), { step })
      // The first MiB is half a second early, and the second one's end is read half a second after it.
      t.ok(performance.now() - before > 400)
      t.ok((await service.shown()).bytes_per_second.used > 0)
      trainer.socket.close()
    }
  },
)

t.test('quotas are counts, and a rate is one that a healthy stream has', async (t) => {
  const service = await started(t, {})
  const cases: [Record<string, number>, RegExp][] = [
    [{ runs: 0 }, /keys\[1\]\.quotas\.runs is 0, expected a count above 0/],
    [{ gpus: 1 }, /keys\[1\]\.quotas\.gpus is unknown/],
    [{ bytes_per_second: 1000 }, /bytes_per_second is 1000, expected a count of 1048576 or more/],
  ]
  for (const [quotas, message] of cases) t.throws(() => service.reload(quotas), { name: 'ConfigError', message })
  t.equal((await service.call('/v1/runs')).status, 200, keyOf('alice'))
})

const LIMIT = 2 ** 20
/** A run whose momentum has as many bytes as may move in a second. */
const MOMENTUM = {
  groups: [{ name: 'g', algorithm: 'sgd', momentum: 0.9 }],
  parameters: [{ name: 'w', shape: [LIMIT / 4], group: 'g' }],
}

/** A service on which nothing that waits for its rate may be taken for a slow client. */
async function withState(test: Test) {
  const service = await started(test, { bytes_per_second: LIMIT }, { send_timeout_seconds: 0.2 })
  const trainer = await connect(service.url, { headers: bearer('root') })
  trainer.send({ type: 'open', protocol: 1, run: 'alice-1', ...MOMENTUM })
  await trainer.next('opened')
  await trainer.step(1, [new Float32Array(LIMIT / 4).fill(0.5)])
  trainer.socket.close()
  return service
}

t.test('state that is read or imported counts, and whoever waits for that is not taken for slow', async (t) => {
  const service = await withState(t)
  const before = performance.now()
  const [whole, parameter] = [
    `${service.url}/v1/runs/alice-1/state`,
    `${service.url}/v1/runs/alice-1/parameters/0/state`,
  ]
  const body = Buffer.from(await (await fetch(whole, { headers: bearer('alice') })).arrayBuffer())
  t.ok(body.length > LIMIT)
  t.equal((await (await fetch(parameter, { headers: bearer('alice') })).arrayBuffer()).byteLength > LIMIT, true)
  const headers = { ...bearer('alice'), 'content-type': 'application/octet-stream' }
  const imported = await fetch(whole, { method: 'PUT', body, headers })
  t.match([imported.status, await imported.json()], [200, { parameters: 1 }])
  // Three MiB: half a second's bytes are early, and the last piece, of one MiB at most, goes before its time.
  t.ok(performance.now() - before > 1400)
  t.ok((await service.shown()).bytes_per_second.used > 0)
})

t.test('a reader that leaves while it waits leaves no memory behind', async (t) => {
  const service = await withState(t)
  const bytes = service.device.admittedBytes
  const path = `${service.url}/v1/runs/alice-1/state`
  for (let i = 0; i < 2; i += 1) await (await fetch(path, { headers: bearer('alice') })).arrayBuffer()
  const waiting = request(path, { headers: bearer('alice'), agent: false }).end()
  await once(waiting, 'response')
  t.ok(service.device.admittedBytes > bytes)
  waiting.destroy()
  while (service.device.admittedBytes > bytes) await new Promise(setImmediate)
})

t.test('gradients in shared memory count as those of a socket', async (t) => {
  const service = await started(t, { bytes_per_second: LIMIT })
  const client = await connectClient(service.url.replace('http', 'ws'), { token: keyOf('alice'), transport: 'shm' })
  const weights = new Float32Array(LIMIT / 4)
  const run = await client.open({
    ...{ run: 'alice-1', groups: MOMENTUM.groups },
    parameters: [{ ...MOMENTUM.parameters[0]!, data: weights }],
  })
  t.equal(run.transport, 'shm')
  const before = performance.now()
  for (let i = 0; i < 3; i += 1) await run.step({ w: new Float32Array(weights.length).fill(0.5) })
  t.ok(performance.now() - before > 400)
  t.ok((await service.shown()).bytes_per_second.used > 0)
  await client.close()
})
