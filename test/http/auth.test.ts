import { once } from 'node:events'
import t from 'tap'
import { WebSocket } from 'ws'
import { connect, openRun, startService } from './service.js'

const KEYS = { api_keys: 'all-1,all-2', read_keys: 'read-1' }
const bearer = (key: string) => ({ authorization: `Bearer ${key}` })

/** The status and the problem document of an upgrade that is refused. */
async function refusedUpgrade(url: string, options: { protocols?: string[]; headers?: Record<string, string> } = {}) {
  const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`, options.protocols ?? [], {
    headers: options.headers,
  })
  socket.on('error', () => {})
  const [, response] = await once(socket, 'unexpected-response')
  const chunks: Buffer[] = await response.toArray()
  socket.terminate()
  return {
    status: response.statusCode,
    type: response.headers['content-type'],
    problem: JSON.parse(Buffer.concat(chunks).toString()),
  }
}

t.test('with keys set, each route asks for the key that the contract wants', async (t) => {
  const { url } = await startService(t, KEYS)
  const cases: [string, string, Record<string, string>, number][] = [
    ['GET', '/livez', {}, 200],
    ['GET', '/readyz', {}, 200],
    ['GET', '/openapi.yaml', {}, 200],
    ['GET', '/docs', {}, 200],
    ['GET', '/docs/', {}, 200],
    ['GET', '/docs/static/swagger-ui.css', {}, 200],
    ['HEAD', '/livez', {}, 200],
    ['HEAD', '/v1/runs', {}, 401],
    ['GET', '/metrics', {}, 401],
    ['GET', '/v1/runs', {}, 401],
    ['GET', '/nowhere', {}, 401],
    ['POST', '/v1/runs', {}, 401],
    ['GET', '/v1/runs', bearer('all-3'), 401],
    ['GET', '/v1/runs', bearer('all-'), 401],
    ['GET', '/v1/runs', bearer(''), 401],
    ['GET', '/v1/runs', { authorization: 'Basic all-1' }, 401],
    ['GET', '/v1/runs', { authorization: 'all-1' }, 401],
    ['GET', '/v1/runs', bearer('all-1'), 200],
    ['GET', '/v1/runs', { authorization: 'bearer all-2' }, 200],
    ['GET', '/v1/runs', bearer('read-1'), 200],
    ['GET', '/metrics', bearer('read-1'), 200],
    ['GET', '/nowhere', bearer('read-1'), 404],
    ['POST', '/v1/runs', bearer('read-1'), 405],
    ['DELETE', '/v1/runs/r', bearer('read-1'), 403],
    ['DELETE', '/v1/runs/r', bearer('all-1'), 404],
    ['GET', '/v1/stream', bearer('read-1'), 403],
    ['GET', '/v1/stream', bearer('all-1'), 426],
  ]
  for (const [method, path, headers, status] of cases) {
    const response = await fetch(`${url}${path}`, { method, headers })
    t.equal(response.status, status, `${method} ${path} ${JSON.stringify(headers)}`)
    if (status >= 400) t.equal(response.headers.get('content-type'), 'application/problem+json')
    if (status === 401) t.equal(response.headers.get('www-authenticate'), 'Bearer')
    await response.arrayBuffer()
  }
})

t.test('an upgrade without the right key is refused with a problem document', async (t) => {
  const { url } = await startService(t, KEYS)
  t.match(await refusedUpgrade(url), {
    status: 401,
    type: 'application/problem+json',
    problem: { code: 'UNAUTHORIZED', status: 401 },
  })
  t.match(await refusedUpgrade(url, { protocols: ['bearer.wrong'] }), {
    status: 401,
    problem: { code: 'UNAUTHORIZED' },
  })
  t.match(await refusedUpgrade(url, { headers: bearer('read-1') }), {
    status: 403,
    problem: { code: 'FORBIDDEN', retryable: false },
  })
})

t.test('a key opens the stream as a header, or as a subprotocol beside muond.v1, which is chosen', async (t) => {
  const { url } = await startService(t, KEYS)
  const cases: [Parameters<typeof connect>[1], string][] = [
    [{ headers: bearer('all-1') }, ''],
    [{ protocols: ['bearer.all-2', 'muond.v1'] }, 'muond.v1'],
    [{ protocols: ['muond.v1'], headers: bearer('all-1') }, 'muond.v1'],
  ]
  for (const [i, [options, chosen]] of cases.entries()) {
    const trainer = await openRun(url, `run-${i}`, options)
    t.equal(trainer.socket.protocol, chosen)
    trainer.socket.close()
  }
})

t.test('an unknown subprotocol is not chosen, and a key is not echoed', async (t) => {
  const { url } = await startService(t, KEYS)
  for (const offered of ['graphql-ws', 'bearer.all-1']) {
    const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`, [offered], { headers: bearer('all-1') })
    const [error] = await once(socket, 'error')
    t.match(error.message, /no subprotocol/, offered)
  }
})

t.test('read keys alone close the service to writers', async (t) => {
  const { url } = await startService(t, { read_keys: 'r' })
  t.match(await refusedUpgrade(url, { headers: bearer('r') }), { status: 403 })
})

t.test('without keys everything is open', async (t) => {
  const { url } = await startService(t)
  const trainer = await connect(url)
  t.equal(trainer.socket.readyState, WebSocket.OPEN)
  trainer.socket.close()
  t.equal((await fetch(`${url}/v1/runs`)).status, 200)
})
