import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import t from 'tap'
import { requestJson } from '../../../src/cluster/coordinator/json-request.js'
import { probePeer } from '../../../src/cluster/coordinator/static/probe.js'

const MIB = Buffer.alloc(2 ** 20, ' ')
const ANSWERS: Readonly<Record<string, (response: ServerResponse) => void>> = {
  '/text': (response) => response.writeHead(502).end('  bad gateway\n'),
  '/empty': (response) => response.writeHead(204).end(),
  '/never': () => undefined,
  '/endless': (response) => {
    const more = () => {
      while (!response.destroyed && response.write(MIB));
    }
    response.on('drain', more)
    more()
  },
}

t.test('an answer is JSON, of a length, and comes in time', async (t) => {
  const server = createServer((request, response) => ANSWERS[request.url!]!(response)).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  const origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const get = (path: string, timeout_ms = 20_000) =>
    requestJson({ url: new URL(origin + path), method: 'GET', timeout_ms })
  await t.rejects(get('/text'), { message: 'it answers 502 and no JSON: bad gateway' })
  t.same(await get('/empty'), { status: 204, body: undefined })
  await t.rejects(get('/never', 50), { message: `${origin} has not answered within 0.05 s` })
  await t.rejects(get('/endless'), { message: 'an answer has more than 33554432 bytes' })
})

t.test('a peer answers a probe with what it tells of itself', async (t) => {
  const report = { free_bytes: 1, device: 'cpu', incarnation: 'i', peers: ['http://a:1'] }
  const server = createServer((request, response) => {
    const { authorization } = request.headers
    if (authorization === 'Bearer wrong') response.writeHead(401).end()
    else response.end(JSON.stringify(authorization === 'Bearer odd' ? { ...report, free_bytes: '1' } : report))
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const probe = (key: string) => probePeer(url, key, AbortSignal.timeout(20_000))
  t.same(await probe('right'), report)
  await t.rejects(probe('wrong'), { message: `${url}/v1/peer answers 401` })
  await t.rejects(probe('odd'), { message: `${url}/v1/peer: free_bytes is "1", expected a count` })
})
