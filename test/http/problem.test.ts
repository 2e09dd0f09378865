import { connect as connectSocket } from 'node:net'
import { PassThrough, Readable } from 'node:stream'
import t from 'tap'
import { ServiceError } from '../../src/errors.js'
import { answerClientError, problemOf } from '../../src/http/problem.js'
import { startService } from './service.js'

async function problem(response: Response) {
  return {
    type: response.headers.get('content-type'),
    allow: response.headers.get('allow'),
    ...((await response.json()) as object),
  }
}

t.test('every refused request is a problem document', async (t) => {
  const { url, metrics } = await startService(t)
  const long = 'a'.repeat(129)
  const cases: [string, string, number, string, RegExp][] = [
    ['GET', '/nowhere?x=1', 404, 'NOT_FOUND', /^there is no GET \/nowhere here$/],
    [
      'GET',
      '/v1/runs/none',
      404,
      'RUN_NOT_FOUND',
      /^there is no run 'none'; without a data folder one ends after 86400 seconds without a connection$/,
    ],
    ['DELETE', '/v1/runs/none', 404, 'RUN_NOT_FOUND', /'none'/],
    ['GET', '/v1/runs/none/parameters', 404, 'RUN_NOT_FOUND', /'none'/],
    ['GET', '/v1/runs/none/parameters/0', 404, 'RUN_NOT_FOUND', /'none'/],
    ['GET', '/v1/runs/none/parameters/0/state', 404, 'RUN_NOT_FOUND', /'none'/],
    ['GET', '/v1/runs/none/receipts', 404, 'RUN_NOT_FOUND', /'none'/],
    ['GET', '/v1/runs/none/events', 404, 'RUN_NOT_FOUND', /'none'/],
    ['GET', `/v1/runs/${long}`, 400, 'REQUEST_INVALID', /params\/run must match pattern/],
    ['GET', '/v1/runs/.hidden', 400, 'REQUEST_INVALID', /params\/run/],
    ['GET', '/v1/runs/r/parameters/-1', 400, 'REQUEST_INVALID', /params\/index must be >= 0/],
    ['GET', '/v1/runs/r/parameters/one', 400, 'REQUEST_INVALID', /params\/index must be integer/],
    ['GET', '/v1/runs/r/parameters?limit=10001', 400, 'REQUEST_INVALID', /querystring\/limit must be <= 10000/],
    ['GET', '/v1/runs/r/receipts?after=x', 400, 'REQUEST_INVALID', /querystring\/after must be integer/],
    ['GET', '/v1/runs/r/receipts?aftr=1', 400, 'REQUEST_INVALID', /^unknown query parameter 'aftr'$/],
    ['GET', '/v1/runs?page=1', 400, 'REQUEST_INVALID', /^unknown query parameter 'page'$/],
    ['GET', '/%zz', 400, 'REQUEST_INVALID', /not a valid url/],
    ['GET', '/v1/stream', 426, 'REQUEST_INVALID', /Upgrade: websocket/],
  ]
  for (const [method, path, status, code, detail] of cases) {
    const response = await fetch(`${url}${path}`, { method })
    t.equal(response.status, status, `${method} ${path}`)
    t.match(
      await problem(response),
      { type: 'about:blank', status, code, retryable: false, detail, title: /^[A-Z]/ },
      `${method} ${path}`,
    )
  }
  const { values } = await metrics.errors_total.get()
  t.equal(
    values.reduce((sum, { value }) => sum + value, 0),
    cases.length,
  )
})

t.test('another method on a known path is 405 and names what is allowed, whatever body it has', async (t) => {
  const { url } = await startService(t)
  const cases: [string, string, string][] = [
    ['PUT', '/v1/runs', 'GET, HEAD, POST'],
    ['PUT', '/v1/runs/r', 'DELETE, GET, HEAD'],
    ['PATCH', '/v1/runs/r/parameters/0/state', 'GET'],
    ['HEAD', '/v1/runs/r/events', 'GET'],
    ['OPTIONS', '/livez', 'GET, HEAD'],
    ['POST', '/v1/stream', 'GET'],
  ]
  for (const [method, path, allow] of cases) {
    const body = method === 'POST' || method === 'PUT' ? 'not json' : undefined
    const response = await fetch(`${url}${path}`, {
      method,
      body,
      headers: body ? { 'content-type': 'application/json' } : {},
    })
    t.equal(response.status, 405, `${method} ${path}`)
    t.equal(response.headers.get('allow'), allow)
    t.equal(response.headers.get('content-type'), 'application/problem+json')
    await response.arrayBuffer()
  }
})

t.test('a body that nobody asked for is refused as the request it is in', async (t) => {
  const { url } = await startService(t)
  const json = await fetch(`${url}/v1/runs/r`, {
    method: 'DELETE',
    body: '{',
    headers: { 'content-type': 'application/json' },
  })
  t.match(await problem(json), { status: 400, code: 'REQUEST_INVALID' })
  const other = await fetch(`${url}/v1/runs/r`, { method: 'DELETE', body: 'x', headers: { 'content-type': 'a/b' } })
  t.match(await problem(other), { status: 415, code: 'REQUEST_INVALID' })
  const large = await fetch(`${url}/v1/runs/r`, {
    method: 'DELETE',
    body: JSON.stringify('x'.repeat(70_000)),
    headers: { 'content-type': 'application/json' },
  })
  t.match(await problem(large), { status: 413, code: 'REQUEST_INVALID' })
})

t.test('bytes that are no HTTP request get a problem document too', async (t) => {
  const { url } = await startService(t)
  const port = Number(new URL(url).port)
  const cases: [string, string][] = [
    ['garbage\r\n\r\n', '400 Bad Request'],
    [
      'GET /v1/stream HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n',
      '400 Bad Request',
    ],
    [`GET / HTTP/1.1\r\nhost: localhost\r\nlong: ${'x'.repeat(20_000)}\r\n\r\n`, '431 Request Header Fields Too Large'],
  ]
  for (const [bytes, status] of cases) {
    const socket = connectSocket(port, '127.0.0.1')
    socket.write(bytes)
    const text = Buffer.concat(await Readable.from(socket).toArray()).toString()
    const [head = '', body = ''] = text.split('\r\n\r\n')
    t.match(head, new RegExp(`^HTTP/1.1 ${status}\r\ncontent-type: application/problem\\+json\r\n`))
    t.match(JSON.parse(body), { code: 'REQUEST_INVALID', status: Number(status.slice(0, 3)) })
  }
})

t.test('an upgrade that is refused ends its connection', async (t) => {
  const { url } = await startService(t)
  for (const path of ['/nowhere', '/%zz', '/v1/runs?x=1']) {
    const socket = connectSocket(Number(new URL(url).port), '127.0.0.1')
    const handshake = 'sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=='
    socket.write(
      `GET ${path} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n${handshake}\r\n\r\n`,
    )
    t.match(
      Buffer.concat(await Readable.from(socket).toArray()).toString(),
      /^HTTP\/1.1 40[04] .*application\/problem\+json.*"code"/s,
      path,
    )
  }
})

t.test('a connection that was reset or cannot be written to gets no answer', async (t) => {
  const reset = new PassThrough()
  answerClientError(Object.assign(new Error('read ECONNRESET'), { code: 'ECONNRESET' }), reset)
  const ended = new PassThrough().end()
  answerClientError(new Error('Parse Error'), ended)
  for (const socket of [reset, ended]) t.match(socket, { destroyed: true, readableLength: 0 })
})

t.test('a problem has the fields of its error, and a bug tells nothing but where to look', async (t) => {
  const overloaded = new ServiceError('OVERLOADED', 'too much', { retry_after_seconds: 1.5 })
  t.same(problemOf(overloaded, 'req-1'), {
    type: 'about:blank',
    title: 'Too Many Requests',
    status: 429,
    detail: 'too much',
    code: 'OVERLOADED',
    retryable: true,
    retry_after_seconds: 1.5,
  })
  t.match(problemOf(new ServiceError('STEP_CONFLICT', 'no', { step: 3, expected_step: 2, parameter: 1 }), ''), {
    step: 3,
    expected_step: 2,
    parameter: 1,
    status: 409,
  })
  for (const bug of [
    new Error('secret path'),
    Object.assign(new Error('secret path'), { statusCode: 502 }),
    'secret path',
  ]) {
    const told = problemOf(bug, 'req-7')
    t.match(told, { status: 500, code: 'INTERNAL', detail: /req-7/, title: 'Internal Server Error' })
    t.notMatch(JSON.stringify(told), /secret/)
  }
  t.equal(problemOf(Object.assign(new Error('odd'), { statusCode: 499 }), '').title, 'Error')
})
