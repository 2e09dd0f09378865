import { once } from 'node:events'
import { existsSync, mkdtempSync, renameSync, rmSync, statSync, unlinkSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { connect } from '../../src/client/client.js'
import { gradientsOf, modelOf } from '../client/model.js'
import { type Service, startService } from '../service.js'
import { keyOf } from './keys.js'

/** A folder of its own with a short path: that of a socket has at most 108 bytes. */
function folderOf(t: Test): string {
  const folder = mkdtempSync(join(tmpdir(), 'muond-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  return folder
}

/** A service that listens on the socket of a new folder. */
async function started(t: Test): Promise<{ service: Service; path: string }> {
  const service = await startService({ lanes: 1 })
  const path = join(folderOf(t), 'm.sock')
  await service.listenLocally(path)
  return { service, path }
}

async function get(socketPath: string, path: string): Promise<{ status: number; body: string }> {
  const outgoing = request({ socketPath, path, agent: false }).end()
  const [response] = await once(outgoing, 'response')
  return { status: response.statusCode, body: Buffer.concat(await response.toArray()).toString() }
}

/** A server that has ended without removing its socket. */
async function leaveStale(path: string): Promise<void> {
  const server = createServer()
  server.listen(`${path}.moved`)
  await once(server, 'listening')
  renameSync(`${path}.moved`, path)
  server.close()
  await once(server, 'close')
}

t.test('REST and streams are served on a Unix socket, which only its user may connect to', async (t) => {
  const { service, path } = await started(t)
  t.equal(statSync(path).mode & 0o777, 0o600)
  t.notOk(existsSync(`${path}.new`))
  t.match(await get(path, '/livez'), { status: 200 })
  const digests: string[] = []
  for (const [name, url, transport] of [
    ['tcp', service.url, 'websocket'],
    ['unix', `ws+unix://${path}`, 'websocket'],
    ['shared', `ws+unix://${path}:/v1/stream`, 'auto'],
  ] as const) {
    const client = await connect(url, { transport })
    const model = modelOf(name)
    const run = await client.open(model)
    for (let step = 1; step <= 2; step++) await run.step(gradientsOf(model.parameters, step))
    t.equal(run.transport, transport === 'auto' ? 'shm' : 'websocket')
    digests.push(run.digest)
    await client.close()
  }
  t.equal(new Set(digests).size, 1, 'the same bits')
  const { values } = await service.metrics.in_place_connections_total.get()
  t.equal(values[0]!.value, 3, 'in place too')
  await service.app.close()
  t.notOk(existsSync(path), 'it ends with the service')
})

t.test('keys hold on a Unix socket as well', async (t) => {
  const service = await startService({ lanes: 1, api_keys: keyOf('s') })
  const path = join(folderOf(t), 'm.sock')
  await service.listenLocally(path)
  t.match(await get(path, '/v1/runs'), { status: 401 })
  await t.rejects(connect(`ws+unix://${path}`), { code: 'UNAUTHORIZED' })
  await (await connect(`ws+unix://${path}`, { token: keyOf('s') })).close()
  await service.app.close()
})

t.test('what a dead server has left is replaced, a living one is not', async (t) => {
  const { service, path } = await started(t)
  const other = await startService({ lanes: 1 })
  await t.rejects(other.listenLocally(path), {
    name: 'ConfigError',
    message: `socket '${path}' is in use: another service listens there`,
  })
  t.match(await get(path, '/livez'), { status: 200 }, 'the first goes on')
  await service.app.close()
  await leaveStale(path)
  await leaveStale(`${path}.new`)
  await other.listenLocally(path)
  t.match(await get(path, '/livez'), { status: 200 })
  // Somebody puts a file there: it is theirs.
  unlinkSync(path)
  writeFileSync(path, 'mine')
  await other.app.close()
  t.ok(existsSync(path))
  const third = await startService({ lanes: 1 })
  await t.rejects(third.listenLocally(path), {
    message: `socket '${path}' is a file of another kind, which stays`,
  })
  await third.app.close()
})

t.test('where no socket can be is said in one line', async (t) => {
  const service = await startService({ lanes: 1 })
  const folder = folderOf(t)
  const foreign = createServer().listen(join(folder, 'f.sock'))
  await once(foreign, 'listening')
  await t.rejects(service.listenLocally(join(folder, 'f.sock')), {
    name: 'ConfigError',
    message: /is in use: another server listens there$/,
  })
  foreign.close()
  const long = join(folder, 'x'.repeat(104))
  await t.rejects(service.listenLocally(long), { message: /^socket '.*' has \d+ bytes, at most 103$/ })
  await t.rejects(service.listenLocally(join(folder, 'nowhere', 's')), {
    name: 'ConfigError',
    message: /^socket '.*' cannot be made: .*ENOENT/,
  })
  await service.app.close()
})
