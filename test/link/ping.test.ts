import type { Socket } from 'node:net'
import t from 'tap'
import { encodeFrame } from '../../src/wire/codec.js'
import { bytesOf, normal, RawClient, type Service, startService, until } from '../service.js'
import { rawFrame, rawGradient } from './websocket/raw-frame.js'

const MASK = Uint8Array.from([0x5a, 0, 0xff, 0x13])
const CHUNK = 100_000
const VALUES = normal(1, CHUNK)
const BYTES = bytesOf(VALUES)
/** The numbers of bytes that a ping may have, from none on. */
const SIZES = Array.from({ length: 126 }, (_, size) => size)

const ping = (size: number) => rawFrame(0x89, Buffer.alloc(size, size + 1), MASK)
const end = () => rawFrame(0x82, encodeFrame({ type: 'end', step: 1 }), MASK)

/** The chunks of one gradient. All but the first are received in place. */
const chunks = () =>
  [0, 1, 2, 3].map((index) => {
    const offset = index * CHUNK
    return rawGradient(0, BYTES.subarray(offset, offset + CHUNK), { mask: MASK, offset })
  })

/** A run of one parameter whose update is its gradient, and the socket below its client. */
async function opened(service: Service, run: string) {
  const client = await RawClient.connect(service.url)
  const pongs: Buffer[] = []
  client.socket.on('pong', (data) => pongs.push(data))
  const groups = [{ name: 'g', algorithm: 'sgd' }]
  await client.open({ run, groups, parameters: [{ name: 'w', shape: [CHUNK], group: 'g' }] })
  const socket: Socket = Reflect.get(client.socket, '_socket')
  return { client, pongs, socket }
}

t.test('pings of every size between the chunks of a gradient are answered, wherever a read ends', async (t) => {
  const service = await startService()
  const pings = SIZES.map(ping)
  const parts = chunks().flatMap((chunk) => [chunk, ...pings])
  for (const shift of [0, 1, 5, 6, 7, 13, 14, 40, 90, 125]) {
    const { client, pongs, socket } = await opened(service, `run${shift}`)
    socket.write(Buffer.concat([rawFrame(0x8a, Buffer.alloc(shift), MASK), ...parts, end()]))
    t.match(await client.expect('receipt'), { step: 1, applied: 1 })
    t.ok(client.updates.get(0)?.data.equals(BYTES), 'the update is the gradient')
    t.same(
      pongs.map((data) => [data.length, data.every((byte) => byte === data.length + 1)]),
      [0, 1, 2, 3].flatMap(() => SIZES.map((size) => [size, true])),
    )
    await client.close()
  }
  await service.app.close()
})

t.test('hundreds of pings in one read, of a client that does not read, are answered once it does', async (t) => {
  const service = await startService()
  const { client, pongs, socket } = await opened(service, 'burst')
  client.socket.pause()
  const pings = Array.from({ length: 500 }, () => ping(125))
  socket.write(Buffer.concat([...pings, ...chunks(), end()]))
  const run = service.runs.get('burst')
  await until(() => run.step === 1 || !run.connected)
  client.socket.resume()
  t.match(await client.expect('receipt'), { step: 1, applied: 1 })
  t.equal(pongs.length, 500)
  await client.close()
  await service.app.close()
})
