import { once } from 'node:events'
import { type IncomingMessage, request } from 'node:http'
import t from 'tap'
import { WebSocket } from 'ws'
import { bearer, keyOf } from './keys.js'
import { startService } from './service.js'

const PATHS = ['/livez', '/readyz', '/docs/', '/openapi.yaml', '/metrics', '/v1/runs', '/v1/stream', '/nowhere']

/** The status and, where it is a problem, the document with which a request with these headers is answered. */
async function answer(url: string, path: string, headers: Record<string, string>, method = 'GET') {
  const outgoing = request(`${url}${path}`, { method, headers, agent: false }).end()
  const [response] = (await once(outgoing, 'response')) as [IncomingMessage]
  const text = Buffer.concat(await response.toArray()).toString()
  const problem = response.headers['content-type'] === 'application/problem+json' ? JSON.parse(text) : undefined
  return { status: response.statusCode, problem }
}

/** 101 where the stream opens, otherwise the status of the refusal. */
async function upgrade(url: string, headers: Record<string, string>): Promise<number | undefined> {
  const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`, { headers })
  socket.on('error', () => {})
  const refused = once(socket, 'unexpected-response').then(([, response]) => response.statusCode)
  const opened = once(socket, 'open').then(() => 101)
  const status = await Promise.race([refused, opened])
  socket.terminate()
  return status
}

t.test('a web page of another origin reaches no route and opens no stream', async (t) => {
  const { url } = await startService(t, { api_keys: keyOf('k'), max_refusals_per_minute: 1000 })
  for (const origin of [
    'http://evil.example',
    'https://127.0.0.1.evil.example',
    'http://127.0.0.1:1',
    'null',
    'file://',
  ]) {
    for (const path of PATHS) {
      const headers = { origin, ...bearer('k') }
      const { status, problem } = await answer(url, path, headers)
      t.equal(status, 403, `${path} from ${origin}`)
      t.match(problem, {
        code: 'FORBIDDEN',
        detail: `pages of the origin '${origin}' may not use this service unless --allowed-origins lists it`,
      })
    }
    t.equal((await answer(url, '/v1/runs/r/checkpoints', { origin }, 'POST')).status, 403, 'a POST')
    t.equal(await upgrade(url, { origin, ...bearer('k') }), 403, `an upgrade from ${origin}`)
  }
})

t.test('a name that was made to lead here is no name of this service', async (t) => {
  const { url } = await startService(t)
  const { port } = new URL(url)
  for (const host of [
    'evil.example',
    `evil.example:${port}`,
    'localhost.evil.example',
    '127.0.0.1.evil.example',
    '10.9.8.7',
    '[::2]:1',
    'a b',
  ]) {
    for (const path of PATHS) t.equal((await answer(url, path, { host })).status, 403, `${path} of ${host}`)
    t.equal(await upgrade(url, { host, origin: `http://${host}` }), 403, `an upgrade for ${host}`)
  }
  const { problem } = await answer(url, '/livez', { host: 'evil.example' })
  t.match(problem, {
    code: 'FORBIDDEN',
    detail: "the Host 'evil.example' is none of this service, which --allowed-hosts can list",
  })
})

t.test('loopback names, the address that is listened on and pages of the service itself are known', async (t) => {
  const { url } = await startService(t, { host: 'trainer.local', api_keys: keyOf('k'), insecure_no_tls: true })
  const { port } = new URL(url)
  for (const host of [
    `127.0.0.1:${port}`,
    `LOCALHOST:${port}`,
    'localhost',
    '127.5.5.5:1',
    `[::1]:${port}`,
    'trainer.local',
  ]) {
    t.equal((await answer(url, '/livez', { host })).status, 200, host)
    t.equal((await answer(url, '/livez', { host, origin: `http://${host}` })).status, 200, `a page of ${host}`)
    t.equal(await upgrade(url, { host, origin: `http://${host}`, ...bearer('k') }), 101, `an upgrade for ${host}`)
  }
})

t.test('hosts and origins that are listed pass, and * lists all of them', async (t) => {
  const lists = {
    allowed_hosts: 'Muond.example,10.9.8.7',
    allowed_origins: 'https://Board.example,http://localhost:3000',
  }
  const listed = await startService(t, lists)
  for (const host of ['muond.example', 'muond.example:8787', '10.9.8.7']) {
    for (const origin of ['https://board.example', 'http://localhost:3000']) {
      t.equal((await answer(listed.url, '/livez', { host, origin })).status, 200, `${host} from ${origin}`)
      t.equal(await upgrade(listed.url, { host, origin }), 101)
    }
  }
  for (const origin of ['http://board.example', 'https://board.example:8443', 'http://localhost:3001'])
    t.equal((await answer(listed.url, '/livez', { origin })).status, 403, origin)
  const all = await startService(t, { allowed_hosts: '*', allowed_origins: '*' })
  t.equal((await answer(all.url, '/livez', { host: 'evil.example', origin: 'null' })).status, 200)
})
