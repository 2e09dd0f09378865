import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import type { Duplex } from 'node:stream'
import t, { type Test } from 'tap'
import { WebSocket, WebSocketServer } from 'ws'
import { Sender } from '../../../src/link/websocket/sender.js'

const MiB = 2 ** 20
const header = (text: string) => Buffer.from(text)
// More bytes than the sender's window and the kernel's socket buffers hold together.
const MUCH = 20

/** Two ends of one WebSocket, the server's with a sender. */
async function pair(t: Test) {
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1', perMessageDeflate: false })
  await once(server, 'listening')
  const accepted = once(server, 'connection')
  const client = new WebSocket(`ws://127.0.0.1:${(server.address() as AddressInfo).port}`, { perMessageDeflate: false })
  const received: Buffer[] = []
  client.on('message', (data: Buffer) => received.push(data))
  const [socket] = (await accepted) as [WebSocket]
  await once(client, 'open')
  t.teardown(() => {
    client.terminate()
    server.close()
  })
  return { client, socket, sender: new Sender(socket), received }
}

t.test('messages arrive whole and in their order, and the sender is not busy after them', async (t) => {
  const { client, sender, received } = await pair(t)
  t.equal(sender.busySince, undefined)
  const before = performance.now()
  const sent = [
    sender.send({ header: header('a'), payload: new Uint8Array(3 * MiB).fill(1) }),
    sender.send({ header: header('b') }),
    sender.send({ header: header('c'), payload: new Uint8Array(2).fill(2) }),
  ]
  t.ok(sender.busySince! >= before)
  t.ok(sender.busy)
  t.same(await Promise.all(sent), [true, true, true])
  t.notOk(sender.busy)
  while (received.length < 3) await once(client, 'message')
  t.same(
    received.map((data) => [data.length, data.subarray(0, 1).toString()]),
    [
      [3 * MiB + 1, 'a'],
      [1, 'b'],
      [3, 'c'],
    ],
  )
})

t.test('updates that are sent in one turn of the event loop leave together', async (t) => {
  const { client, socket, sender, received } = await pair(t)
  const stream: Duplex = Reflect.get(socket, '_socket')
  const sent = ['a', 'b', 'c'].map((text) => sender.send({ header: header(text), payload: new Uint8Array(8) }))
  t.equal(stream.writableCorked, 1)
  t.ok(stream.writableLength >= 3 * 9, 'all three wait')
  t.same(await Promise.all(sent), [true, true, true])
  t.equal(stream.writableCorked, 0)
  while (received.length < 3) await once(client, 'message')
  t.same(
    received.map((data) => data.subarray(0, 1).toString()),
    ['a', 'b', 'c'],
  )
})

t.test('what waits behind the window can be dropped; a header alone passes it', async (t) => {
  const { client, sender, received } = await pair(t)
  client.pause()
  const payload = new Uint8Array(4 * MiB)
  const sent = Array.from({ length: MUCH }, (_, i) =>
    sender.send({ header: header(String.fromCharCode(65 + i)), payload }),
  )
  const told = sender.send({ header: header('!') })
  sender.drop()
  client.resume()
  t.equal(await told, true)
  const whole = (await Promise.all(sent)).filter((sent) => sent).length
  t.ok(whole >= 1 && whole < MUCH, `${whole} of ${MUCH} were in the socket`)
  while (received.length < whole + 1) await once(client, 'message')
  t.equal(received.length, whole + 1)
  t.equal(received.at(-1)?.toString(), '!')
})

t.test('a lost connection ends everything that is on its way', async (t) => {
  const { client, socket, sender } = await pair(t)
  client.pause()
  const payload = new Uint8Array(4 * MiB)
  const sent = Array.from({ length: MUCH }, () => sender.send({ header: header('x'), payload }))
  socket.terminate()
  t.ok((await Promise.all(sent)).includes(false))
  t.equal(await sender.send({ header: header('late') }), false)
  t.equal(await sender.send({ header: header('late'), payload }), false)
  t.notOk(sender.busy)
})
