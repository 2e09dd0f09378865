import { once } from 'node:events'
import t from 'tap'
import { WebSocket } from 'ws'
import { bearer, keyOf } from './keys.js'
import { connect, openRun, startService } from './service.js'

const KEYS = { api_keys: `${keyOf('one')},${keyOf('two')}` }

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

t.test('a key is a bearer token, and whatever is not open to all takes one, also what is not there', async (t) => {
  const { url } = await startService(t, KEYS)
  const cases: [string, string, Record<string, string>, number][] = [
    ['GET', '/docs/', {}, 200],
    ['GET', '/docs/static/swagger-ui.css', {}, 200],
    ['HEAD', '/livez', {}, 200],
    ['HEAD', '/v1/runs', {}, 401],
    ['GET', '/nowhere', {}, 401],
    ['POST', '/v1/runs', {}, 401],
    ['GET', '/v1/runs', { authorization: `Bearer ${keyOf('one').slice(0, -1)}` }, 401],
    ['GET', '/v1/runs', { authorization: `Bearer ${keyOf('one')}x` }, 401],
    ['GET', '/v1/runs', { authorization: 'Bearer ' }, 401],
    ['GET', '/v1/runs', { authorization: `Basic ${keyOf('one')}` }, 401],
    ['GET', '/v1/runs', { authorization: keyOf('one') }, 401],
    ['GET', '/v1/runs', bearer('one'), 200],
    ['GET', '/v1/runs', { authorization: `bearer ${keyOf('two')}` }, 200],
    ['GET', '/nowhere', bearer('one'), 404],
    ['PUT', '/v1/runs', bearer('one'), 405],
    ['DELETE', '/v1/runs/r', bearer('one'), 404],
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
    problem: { code: 'UNAUTHORIZED', retryable: false },
  })
})

t.test('a key opens the stream as a header, or as a subprotocol beside muond.v1, which is chosen', async (t) => {
  const { url } = await startService(t, KEYS)
  const cases: [Parameters<typeof connect>[1], string][] = [
    [{ headers: bearer('one') }, ''],
    [{ protocols: [`bearer.${keyOf('two')}`, 'muond.v1'] }, 'muond.v1'],
    [{ protocols: ['muond.v1'], headers: bearer('one') }, 'muond.v1'],
  ]
  for (const [i, [options, chosen]] of cases.entries()) {
    const trainer = await openRun(url, `run-${i}`, options)
    t.equal(trainer.socket.protocol, chosen)
    trainer.socket.close()
  }
})

t.test('an unknown subprotocol is not chosen, and a key is not echoed', async (t) => {
  const { url } = await startService(t, KEYS)
  for (const offered of ['graphql-ws', `bearer.${keyOf('one')}`]) {
    const socket = new WebSocket(`${url.replace('http', 'ws')}/v1/stream`, [offered], { headers: bearer('one') })
    const [error] = await once(socket, 'error')
    t.match(error.message, /no subprotocol/, offered)
  }
})

/** Refuses `count` upgrades, and answers the last refusal. */
async function refuse(url: string, count: number, options: Parameters<typeof refusedUpgrade>[1]) {
  for (let i = 1; i < count; i++) await refusedUpgrade(url, options)
  return refusedUpgrade(url, options)
}

t.test('an address whose upgrades are refused too often is told to wait, and the right key still passes', async (t) => {
  const { url } = await startService(t, { ...KEYS, max_refusals_per_minute: 3 })
  t.match(await refuse(url, 3, { headers: bearer('wrong') }), { status: 401 })
  t.match(await refusedUpgrade(url, { headers: bearer('wrong') }), {
    status: 429,
    problem: {
      code: 'OVERLOADED',
      retryable: true,
      detail: '4 requests of this address were refused within a minute, at most 3 are answered',
      retry_after_seconds: Number,
    },
  })
  t.equal((await fetch(`${url}/v1/runs`)).status, 429, 'REST counts, too')
  t.equal((await fetch(`${url}/livez`)).status, 200)
  const trainer = await openRun(url, 'r', { headers: bearer('one') })
  trainer.socket.close()
})

t.test('upgrades of other origins count, what a key may not do over REST does not', async (t) => {
  const { url } = await startService(t, { ...KEYS, max_refusals_per_minute: 3 })
  const origin = { ...bearer('one'), origin: 'https://evil.example' }
  for (let i = 0; i < 5; i++) t.equal((await fetch(`${url}/v1/runs`, { headers: origin })).status, 403)
  t.match(await refuse(url, 3, { headers: origin }), { status: 403 })
  t.match(await refusedUpgrade(url, { headers: origin }), { status: 429 })
})

t.test('without keys everything is open', async (t) => {
  const { url } = await startService(t)
  const trainer = await connect(url)
  t.equal(trainer.socket.readyState, WebSocket.OPEN)
  trainer.socket.close()
  t.equal((await fetch(`${url}/v1/runs`)).status, 200)
})
