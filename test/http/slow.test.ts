import { once } from 'node:events'
import { request } from 'node:http'
import { connect } from 'node:net'
import t from 'tap'
import { MOST_READERS } from '../../src/http/readers.js'
import { normal, RawClient, type Service, startService, told } from '../service.js'

const ELEMENTS = 2 ** 23
const GROUPS = [{ name: 'g', algorithm: 'sgd', momentum: 0.9 }]
const GRADIENT = normal(1, ELEMENTS)
// Longer than a busy machine keeps this process from its turn: its own client must not be found slow.
const FAST = { send_timeout_seconds: 1.5, min_bytes_per_second: 2 ** 14 }

async function started(settings: Parameters<typeof startService>[0] = {}) {
  const service = await startService({ lanes: 1, ...settings })
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', groups: GROUPS, parameters: [{ name: 'w', shape: [ELEMENTS], group: 'g' }] })
  await client.step(1, [GRADIENT])
  return { service, client }
}

/** The answer to a request whose body never ends: `bytes` at once, and then one at a time. */
async function drip({ http }: Service, path: string, options: { method: string; type: string; bytes: Uint8Array }) {
  const { method, type, bytes } = options
  const outgoing = request(`${http}${path}`, { method, agent: false, headers: { 'content-type': type } })
  outgoing.on('error', () => {})
  outgoing.write(bytes)
  const timer = setInterval(() => outgoing.write(' '), 20)
  const [response] = await once(outgoing, 'response')
  clearInterval(timer)
  const chunks: Buffer[] = await response.toArray()
  const closed = once(outgoing, 'close')
  await closed
  return { status: response.statusCode, problem: JSON.parse(Buffer.concat(chunks).toString()) }
}

/** A GET of which nothing is read but its first bytes. */
async function unread({ http }: Service, path: string) {
  const socket = connect(Number(new URL(http).port), '127.0.0.1')
  socket.on('error', () => {})
  socket.write(`GET ${path} HTTP/1.1\r\nHost: localhost\r\n\r\n`)
  const [head] = await once(socket, 'data')
  socket.pause()
  return { socket, status: Number(String(head.subarray(9, 12))), head: String(head.subarray(0, 1000)) }
}

t.test('a body that drips is refused, and its connection goes', async (t) => {
  const { service, client } = await started(FAST)
  const json = { method: 'POST', type: 'application/json', bytes: Buffer.from('{"tag":') }
  const slow = /^\d+ bytes moved within 1\.5 seconds, at least 24576 must$/
  t.match(await drip(service, '/v1/runs/r/checkpoints', json), {
    status: 429,
    problem: { code: 'OVERLOADED', detail: slow },
  })
  const state = {
    method: 'PUT',
    type: 'application/octet-stream',
    bytes: new Uint8Array(BigInt64Array.of(1000n).buffer),
  }
  t.match(await drip(service, '/v1/runs/r/state', state), {
    status: 429,
    problem: { code: 'OVERLOADED', detail: slow },
  })
  t.equal((await client.step(2, [GRADIENT])).step, 2)
  await client.close()
  await service.app.close()
})

t.test('a stream is no body: nothing watches the request that it was before', async (t) => {
  const { service, client } = await started(FAST)
  const told: unknown[] = []
  service.app.server.prependListener('upgrade', (request) => request.on('error', (error: unknown) => told.push(error)))
  const idle = await RawClient.connect(service.url)
  await idle.open({ run: 'idle', groups: GROUPS, parameters: [{ name: 'w', shape: [4], group: 'g' }] })
  const json = { method: 'POST', type: 'application/json', bytes: Buffer.from('{"tag":') }
  t.match(await drip(service, '/v1/runs/r/checkpoints', json), { status: 429 }, 'a window has passed')
  t.same(told, [])
  for (const one of [client, idle]) await one.close()
  await service.app.close()
})

t.test('a body that keeps the least rate is read to its end, however long that takes', async (t) => {
  const { service, client } = await started({ send_timeout_seconds: 1, min_bytes_per_second: 1 })
  const headers = { 'content-type': 'application/octet-stream' }
  const outgoing = request(`${service.http}/v1/runs/r/state`, { method: 'PUT', agent: false, headers })
  outgoing.write(new Uint8Array(BigInt64Array.of(1000n).buffer))
  let written = 0
  const timer = setInterval(() => {
    written += 1
    if (written < 40) return void outgoing.write(' ')
    clearInterval(timer)
    outgoing.end()
  }, 40)
  const [response] = await once(outgoing, 'response')
  await response.toArray()
  t.equal(response.statusCode, 400, 'it is no safetensors file, and was not told to hurry')
  t.equal(written, 40)
  await client.close()
  await service.app.close()
})

t.test('state that nobody reads is kept once, for so many readers', async (t) => {
  const { service, client } = await started()
  const path = '/v1/runs/r/state'
  const bytes = 4 * ELEMENTS
  const granted = service.device.admittedBytes
  const readers = await Promise.all(Array.from({ length: MOST_READERS }, () => unread(service, path)))
  for (const { status } of readers) t.equal(status, 200)
  t.equal(service.device.admittedBytes, granted + bytes, 'it is admitted, once')
  t.match(await unread(service, path), { status: 429, head: /8 readers have state of run 'r', at most 8 may/ })
  readers[0]!.socket.destroy()
  await client.step(2, [GRADIENT])
  const late = await unread(service, path)
  t.match(late, { status: 429, head: /7 readers have the state of run 'r' after step 1, which comes first/ })
  await client.step(3, [GRADIENT])
  t.equal(service.device.memory.bytes, 2 * bytes, 'one older state and no more')
  for (const { socket } of readers) socket.destroy()
  while (service.device.memory.bytes > bytes) await new Promise(setImmediate)
  t.equal(service.device.admittedBytes, granted)
  const whole = await (await fetch(`${service.http}${path}`)).arrayBuffer()
  t.ok(whole.byteLength > bytes)
  await client.close()
  await service.app.close()
})

t.test('all readers of state together make one piece of it in a turn of the event loop', async (t) => {
  const { service, client } = await started()
  const { device } = service
  const read = device.read.bind(device)
  /** The turns in which a piece was made. */
  const turns: number[] = []
  device.read = function* (tensors) {
    for (const piece of read(tensors)) {
      turns.push(now)
      yield piece
    }
  }
  let now = 0
  const count = () => {
    now += 1
    counting = setImmediate(count)
  }
  let counting = setImmediate(count)
  const parameter = '/v1/runs/r/parameters/0'
  const paths = [
    '/v1/runs/r/state',
    '/v1/runs/r/state',
    `${parameter}/state`,
    `${parameter}/state`,
    parameter,
    parameter,
  ]
  const bodies = await Promise.all(
    paths.map(async (path) => Buffer.from(await (await fetch(`${service.http}${path}`)).arrayBuffer())),
  )
  clearImmediate(counting)
  t.equal(turns.length, (paths.length * 4 * ELEMENTS) / 2 ** 20, 'a piece has 1 MiB')
  t.equal(new Set(turns).size, turns.length)
  for (const i of [0, 2, 4]) t.ok(Buffer.compare(bodies[i]!, bodies[i + 1]!) === 0, `${paths[i]} reads the same twice`)
  await client.close()
  await service.app.close()
})

t.test('state that nobody reads is not kept for ever, and who did not is counted', async (t) => {
  const { service, client } = await started(FAST)
  const { socket } = await unread(service, '/v1/runs/r/state')
  await client.step(2, [GRADIENT])
  while (service.device.memory.bytes > 4 * ELEMENTS) await new Promise(setImmediate)
  const closed = once(socket, 'close')
  socket.resume()
  await closed
  t.equal(await told(service, 'OVERLOADED'), 1)
  await client.close()
  await service.app.close()
})

t.test('the state of one parameter is admitted too', async (t) => {
  const { service, client } = await started({ ...FAST, send_timeout_seconds: 60, state_bytes_limit: 4 * 4 * ELEMENTS })
  const path = '/v1/runs/r/parameters/0/state'
  const readers = [await unread(service, path), await unread(service, path), await unread(service, path)]
  const statuses = readers.map(({ status }) => status)
  t.equal(statuses[0], 200)
  t.equal(statuses.at(-1), 507, `${statuses}`)
  t.match(readers.at(-1)!.head, /OVER_CAPACITY/)
  t.match(await unread(service, '/v1/runs/r/state'), { status: 507, head: /OVER_CAPACITY/ })
  for (const { socket } of readers) socket.destroy()
  t.equal(await told(service, 'OVER_CAPACITY'), statuses.filter((status) => status === 507).length + 1)
  await client.close()
  await service.app.close()
})
