import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { promisify } from 'node:util'
import t from 'tap'
import { UPGRADE } from '../link/websocket/raw-frame.js'
import { RawClient, type Service, startService, turn } from '../service.js'

const GET = 'GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n'
const EVENTS = 'GET /v1/runs/r/events HTTP/1.1\r\nHost: localhost\r\n\r\n'

const refused = async ({ metrics }: Service) => (await metrics.refused_sockets_total.get()).values[0]!.value

const connections = ({ app }: Service) => promisify(app.server.getConnections.bind(app.server))()

/** A socket that the service knows. */
async function dial({ app }: Service): Promise<Socket> {
  const { port } = app.server.address() as { port: number }
  const accepted = once(app.server, 'connection')
  const socket = connect(port, '127.0.0.1').on('error', () => {})
  await accepted
  return socket
}

/** The end of a socket, with an error or without. */
const closing = (socket: Socket) => new Promise((resolve) => socket.once('close', resolve))

/** Sends a request and answers the beginning of what comes back. */
async function ask(socket: Socket, request: string): Promise<string> {
  socket.write(request)
  const [answer] = await once(socket, 'data')
  return String(answer)
}

t.test('whatever is not the stream is not upgraded, and nothing that follows is read', async (t) => {
  const service = await startService()
  const { port } = new URL(service.http)
  for (const path of ['/livez', '/readyz', '/docs', '/docs/', '/openapi.yaml', '/metrics', '/v1/runs', '/nowhere']) {
    const socket = connect(Number(port), '127.0.0.1')
    socket.on('error', () => {})
    socket.write(UPGRADE.replace('/v1/stream', path))
    const [answer] = await once(socket, 'data')
    t.match(
      String(answer),
      /^HTTP\/1\.1 400 .*only \/v1\/stream is a WebSocket: ask for GET \/\S+ without 'Upgrade'/s,
      path,
    )
    if (!socket.destroyed) await once(socket, 'close')
  }
  await service.app.close()
})

t.test('who sends no request keeps nobody out: the oldest of such sockets makes room', async (t) => {
  const service = await startService({ max_sockets: 3 })
  const silent = [await dial(service), await dial(service), await dial(service)]
  for (const socket of silent) socket.resume()
  silent[0]!.write('GET /livez HTTP/1.1\r\nHo')
  for (const socket of silent) {
    const closed = closing(socket)
    const probe = await dial(service)
    t.match(await ask(probe, GET), /^HTTP\/1.1 200/)
    await closed
  }
  t.equal(await refused(service), 3)
  await service.app.close()
})

t.test('a socket whose request is answered waits from then on, and one in use is never closed', async (t) => {
  const service = await startService({ max_sockets: 3 })
  const client = await RawClient.connect(service.url)
  await client.open({
    run: 'r',
    groups: [{ name: 'g', algorithm: 'sgd' }],
    parameters: [{ name: 'w', shape: [1], group: 'g' }],
  })
  const idle = await dial(service)
  t.match(await ask(idle, GET + GET), /^HTTP\/1.1 200/)
  const events = await dial(service)
  t.match(await ask(events, EVENTS), /^HTTP\/1.1 200/)
  const evicted = closing(idle)
  const more = await dial(service)
  t.match(await ask(more, EVENTS), /^HTTP\/1.1 200/)
  await evicted
  const surplus = await dial(service)
  surplus.resume()
  await closing(surplus)
  t.equal(await refused(service), 2)
  t.equal((await client.step(1, [Float32Array.of(1)])).step, 1)
  events.destroy()
  while ((await connections(service)) > 2) await turn()
  const next = await dial(service)
  t.match(await ask(next, GET), /^HTTP\/1.1 200/)
  await service.app.close()
})

t.test('a request must come', async (t) => {
  const service = await startService({ open_timeout_seconds: 1 })
  const silent = [await dial(service), await dial(service)]
  for (const socket of silent) socket.resume()
  silent[1]!.write('GET /livez HTTP/1.1\r\nHo')
  await Promise.all(silent.map((socket) => closing(socket)))
  t.equal((await fetch(`${service.http}/livez`)).status, 200)
  await service.app.close()
})
