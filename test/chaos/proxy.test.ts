import { once } from 'node:events'
import { createServer } from 'node:http'
import t, { type Test } from 'tap'
import { WebSocket, WebSocketServer } from 'ws'
import { encodeFrame, encodeHeader } from '../../src/wire/codec.js'
import { listen } from '../client/service.js'
import { type Direction, FrameProxy, type Meddle } from './proxy.js'

/** A WebSocket that answers each message with itself, and the proxy that leads to it. */
async function startEcho(t: Test) {
  const http = createServer()
  const server = new WebSocketServer({ server: http, perMessageDeflate: false })
  server.on('connection', (socket) => socket.on('message', (bytes) => socket.send(bytes)))
  const proxy = await FrameProxy.start()
  proxy.target = await listen(http)
  t.teardown(async () => {
    await proxy.close()
    server.close()
    http.close()
  })
  return { proxy, server }
}

async function open(t: Test, { url }: FrameProxy): Promise<WebSocket> {
  const socket = new WebSocket(url, { perMessageDeflate: false })
  socket.on('error', () => {})
  t.teardown(() => socket.terminate())
  await once(socket, 'open')
  return socket
}

const end = (step: number) => encodeFrame({ type: 'end', step })
const answer = async (socket: WebSocket) => ((await once(socket, 'message')) as [Buffer])[0]

t.test('without meddling everything passes, a close too', async (t) => {
  const { proxy } = await startEcho(t)
  const socket = await open(t, proxy)
  for (const bytes of [end(1), Buffer.alloc(100_000, 'x')]) {
    socket.send(bytes)
    t.ok((await answer(socket)).equals(bytes))
  }
  socket.ping()
  await once(socket, 'pong')
  socket.close(4000)
  t.equal((await once(socket, 'close'))[0], 4000)
  t.equal(proxy.connections, 1)
})

t.test('every frame is shown with its label, its direction and its connection', async (t) => {
  const { proxy } = await startEcho(t)
  const seen: unknown[] = []
  proxy.meddle = ({ frame, label, direction, link }) => {
    seen.push([direction, link.number, label?.type, frame.fin])
    return [frame.bytes]
  }
  await open(t, proxy)
  const socket = await open(t, proxy)
  socket.send(encodeHeader({ type: 'gradient', parameter: 0, step: 1, offset: 0 }, 4), { binary: true, fin: false })
  socket.ping()
  await once(socket, 'pong')
  socket.send(Buffer.alloc(4), { binary: true, fin: true })
  await answer(socket)
  t.same(seen, [
    ['up', 2, 'gradient', false],
    ['up', 2, undefined, true],
    ['down', 2, undefined, true],
    // The further frames of a message have its label.
    ['up', 2, 'gradient', true],
    ['down', 2, 'gradient', true],
  ])
})

t.test('frames are dropped, replaced and held back in their order', async (t) => {
  const { proxy } = await startEcho(t)
  let release: () => void = () => {}
  const held = new Promise<void>((resolve) => {
    release = resolve
  })
  const meddle = (way: Direction, change: (step: number, bytes: Buffer) => Buffer[] | Promise<Buffer[]>): Meddle => {
    return ({ frame, label, direction }) =>
      direction === way ? change(Number(label?.step), frame.bytes) : [frame.bytes]
  }
  proxy.meddle = meddle('down', async (step, bytes) => {
    if (step === 1) await held
    if (step === 2) return []
    return step === 3 ? [bytes, bytes] : [bytes]
  })
  const socket = await open(t, proxy)
  const received: Buffer[] = []
  socket.on('message', (bytes: Buffer) => received.push(bytes))
  for (const step of [1, 2, 3, 4]) socket.send(end(step))
  release()
  while (received.length < 4) await once(socket, 'message')
  t.same(received, [1, 3, 3, 4].map(end))
})

t.test('a connection is cut by itself or with all others; another one can be made', async (t) => {
  const { proxy } = await startEcho(t)
  proxy.meddle = async ({ link, frame, direction }) => {
    await link.write(direction, frame.bytes.subarray(0, 1))
    link.cut()
    return [frame.bytes]
  }
  const [first, second] = [await open(t, proxy), await open(t, proxy)]
  first.send(end(1))
  t.equal((await once(first, 'close'))[0], 1006)
  t.equal(second.readyState, second.OPEN)
  proxy.cut()
  t.equal((await once(second, 'close'))[0], 1006)
  proxy.rest()
  const third = await open(t, proxy)
  third.send(end(1))
  t.ok((await answer(third)).equals(end(1)))
  proxy.meddle = async ({ link, frame, direction }) => {
    await link.write(direction, frame.bytes)
    return []
  }
  third.send(end(2))
  t.ok((await answer(third)).equals(end(2)))
})

t.test('a connection on which nothing moves any more is cut where it was asked for', async (t) => {
  const { proxy } = await startEcho(t)
  proxy.meddle = ({ frame, label, link }) => {
    if (label?.step !== 2) return [frame.bytes]
    link.cutWhenSilent(20)
    return []
  }
  const socket = await open(t, proxy)
  socket.send(end(1))
  await answer(socket)
  socket.send(end(2))
  t.equal((await once(socket, 'close'))[0], 1006)
})

t.test(
  'when the service has gone its last bytes still arrive, and none is reached until there is another',
  async (t) => {
    const { proxy, server } = await startEcho(t)
    const socket = await open(t, proxy)
    const received = answer(socket)
    for (const client of server.clients) {
      client.send(end(9))
      client.terminate()
    }
    t.ok((await received).equals(end(9)))
    await once(socket, 'close')
    proxy.target = undefined
    const refused = new WebSocket(proxy.url)
    await t.rejects(once(refused, 'open'))
  },
)

t.test('a service that cannot be reached ends the connection', async (t) => {
  const proxy = await FrameProxy.start()
  t.teardown(() => proxy.close())
  const unused = await FrameProxy.start()
  proxy.target = Number(new URL(unused.url).port)
  await unused.close()
  const socket = new WebSocket(proxy.url)
  await t.rejects(once(socket, 'open'))
})
