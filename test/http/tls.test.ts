import { execFile } from 'node:child_process'
import { once } from 'node:events'
import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { request } from 'node:https'
import { connect as connectSocket, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect as connectTls, type TLSSocket } from 'node:tls'
import { promisify } from 'node:util'
import t, { type Test } from 'tap'
import { type Client, connect } from '../../src/client/client.js'
import { gradientsOf, modelOf } from '../client/model.js'
import { startService, told } from '../service.js'
import { keyOf } from './keys.js'

const file = (name: string) => join('test/golden/tls', name)
const read = (name: string) => readFileSync(file(name))
const CA = read('ca.pem')
const SETTINGS = { tls_cert: file('server.pem'), tls_key: file('server.key') }
type Settings = Parameters<typeof startService>[0]

async function started(test: Test, settings: Settings = {}) {
  const service = await startService({ ...SETTINGS, lanes: 1, staging_bytes: 2 ** 20, drain_seconds: 0, ...settings })
  test.teardown(() => service.app.close())
  const { port } = new URL(service.url)
  return { ...service, port: Number(port), url: `wss://127.0.0.1:${port}`, https: `https://127.0.0.1:${port}` }
}

/** A run of a client, which can take its first step. */
async function opened(client: Client) {
  const model = modelOf('r')
  const run = await client.open(model)
  return { step: async () => (await run.step(gradientsOf(model.parameters, 1))).step }
}

/** The status of an answer, and the common name of the certificate that it came with. */
async function get(url: string, options: object = {}) {
  const outgoing = request(url, { ca: CA, agent: false, ...options }).end()
  const [response] = await once(outgoing, 'response')
  const name = (response.socket as TLSSocket).getPeerCertificate().subject.CN
  response.resume()
  await once(response, 'end')
  return { status: response.statusCode, name }
}

t.test('with a certificate HTTP and the stream go over TLS, and nothing else is understood', async (t) => {
  const service = await started(t)
  t.same(await get(`${service.https}/livez`), { status: 200, name: 'server' })
  const client = await connect(service.url, { socket: { ca: CA } })
  const run = await opened(client)
  t.equal(await run.step(), 1)
  await client.close()
  await t.rejects(fetch(`http://127.0.0.1:${service.port}/livez`))
  await t.rejects(connect(service.url), /self-signed|certificate/, 'a certificate of nobody that the client trusts')
})

t.test(
  'a certificate that is renewed on the disk is the next connection’s, and one that is none changes nothing',
  async (t) => {
    const folder = t.testdir({})
    const place = (name: string) => {
      copyFileSync(file(`${name}.pem`), join(folder, 'c.pem'))
      copyFileSync(file(`${name}.key`), join(folder, 'c.key'))
    }
    place('server')
    const service = await started(t, { tls_cert: join(folder, 'c.pem'), tls_key: join(folder, 'c.key') })
    const client = await connect(service.url, { socket: { ca: CA } })
    const run = await opened(client)
    place('renewed')
    service.reload()
    t.match(await get(`${service.https}/livez`), { name: 'renewed' })
    t.equal(await run.step(), 1, 'the connection of before goes on')
    copyFileSync(file('server.key'), join(folder, 'c.key'))
    t.throws(() => service.reload(), { name: 'ConfigError', message: /tls_cert .* and tls_key .* cannot be used: / })
    writeFileSync(join(folder, 'c.pem'), 'no certificate')
    t.throws(() => service.reload(), { name: 'ConfigError' })
    t.match(await get(`${service.https}/livez`), { name: 'renewed' })
    await client.close()
  },
)

t.test('with a client CA only those come who have a certificate of it', async (t) => {
  const service = await started(t, { tls_client_ca: file('ca.pem') })
  const own = { cert: read('client.pem'), key: read('client.key') }
  t.match(await get(`${service.https}/v1/runs`, own), { status: 200 })
  await (await connect(service.url, { socket: { ca: CA, ...own } })).close()
  await t.rejects(get(`${service.https}/livez`))
  await t.rejects(connect(service.url, { socket: { ca: CA } }))
})

t.test('files that cannot be used are one line at the start', async (t) => {
  await t.rejects(started(t, { tls_key: file('nowhere') }), {
    name: 'ConfigError',
    message: /^tls_key '.*nowhere' cannot be read: ENOENT/,
  })
  await t.rejects(started(t, { tls_key: file('client.key') }), { name: 'ConfigError', message: /cannot be used/ })
})

const connected = async (socket: Socket, event: string) => {
  socket.on('error', () => {})
  await once(socket, event)
  return socket
}

t.test('sockets count from before their handshake, and the longest waiting one makes room', async (t) => {
  const service = await started(t, { max_sockets: 3 })
  const where = { port: service.port, host: '127.0.0.1', ca: CA }
  const silent = await connected(connectSocket(service.port, '127.0.0.1'), 'connect')
  const shaken = await connected(connectTls(where), 'secureConnect')
  const stream = await connect(service.url, { socket: { ca: CA } })
  const gone = [silent, shaken].map((socket) => once(socket.resume(), 'close'))
  t.match(await get(`${service.https}/livez`), { status: 200 })
  t.match(await get(`${service.https}/livez`), { status: 200 })
  const more = await connected(connectTls(where), 'secureConnect')
  const another = await connected(connectTls(where), 'secureConnect')
  await Promise.all(gone)
  const run = await opened(stream)
  t.equal(await run.step(), 1, 'the stream is in use')
  for (const socket of [more, another]) socket.destroy()
  await stream.close()
})

t.test('a Unix socket beside TLS is plain', async (t) => {
  const service = await started(t)
  const path = join(t.testdir({}), 's')
  await service.listenLocally(path)
  const client = await connect(`ws+unix://${path}`)
  const run = await opened(client)
  t.equal(await run.step(), 1)
  await client.close()
  t.equal(await told(service, 'INTERNAL'), 0)
})

t.test('the health check of the image asks the socket, where the port takes certificates of clients', async (t) => {
  const tls_client_ca = file('ca.pem')
  const service = await started(t, { tls_client_ca, api_keys: keyOf('h') })
  const path = join(mkdtempSync(join(tmpdir(), 'muond-')), 's')
  t.teardown(() => rmSync(join(path, '..'), { recursive: true }))
  await service.listenLocally(path)
  const mutual = { MUOND_PORT: String(service.port), MUOND_TLS_CERT: 'c', MUOND_TLS_CLIENT_CA: tls_client_ca }
  await healthcheck({ ...mutual, MUOND_SOCKET: path })
  await t.rejects(healthcheck(mutual), {
    code: 1,
    stderr: /MUOND_TLS_CLIENT_CA the port asks for a certificate: set MUOND/,
  })
  await t.rejects(
    healthcheck({ MUOND_PORT: String(service.port) }),
    { code: 1 },
    'a port that speaks TLS, and is not told so',
  )
  const one = await started(t)
  await healthcheck({ MUOND_PORT: String(one.port), MUOND_TLS_CERT: 'c' })
  await one.app.close()
  await t.rejects(healthcheck({ MUOND_PORT: String(one.port), MUOND_TLS_CERT: 'c' }), { code: 1 }, 'nobody is there')
})

/** Runs the check with these variables. Rejects where it does not end with 0. */
function healthcheck(variables: Record<string, string>) {
  return promisify(execFile)(process.execPath, ['deploy/healthcheck.js'], {
    env: { PATH: process.env.PATH, ...variables },
  })
}
