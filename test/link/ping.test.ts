import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import t from 'tap'
import { encodeFrame } from '../../src/wire/codec.js'
import { bytesOf, normal, RawClient, type Service, startService } from '../service.js'
import { rawFrame, rawGradient, UPGRADE } from './websocket/raw-frame.js'

const MASK = Uint8Array.from([0x5a, 0, 0xff, 0x13])
const CHUNK = 100_000
const VALUES = normal(1, CHUNK)
const BYTES = bytesOf(VALUES)
/** The numbers of bytes that a ping may have, from none on. */
const SIZES = Array.from({ length: 126 }, (_, size) => size)

const ping = (size: number) => rawFrame(0x89, Buffer.alloc(size, size + 1), MASK)
const end = () => rawFrame(0x82, encodeFrame({ type: 'end', step: 1 }), MASK)

/** The chunks of one gradient, which are received in place. */
const chunks = () =>
  [0, 1, 2, 3].map((index) => {
    const offset = index * CHUNK
    return rawGradient(0, BYTES.subarray(offset, offset + CHUNK), { mask: MASK, offset })
  })

/** The socket of a stream that has sent `first` in one packet with its request. */
async function upgraded({ http }: Service, first: Uint8Array): Promise<Socket> {
  const socket = connect(Number(new URL(http).port), '127.0.0.1')
  socket.write(Buffer.concat([Buffer.from(UPGRADE), first]))
  await once(socket, 'data')
  return socket
}

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

t.test(
  'of pings of every size between the chunks of a gradient the last is answered, wherever a read ends',
  async (t) => {
    const service = await startService()
    const pings = SIZES.map(ping)
    const parts = chunks().flatMap((chunk) => [chunk, ...pings])
    for (const shift of [0, 1, 5, 6, 7, 13, 14, 40, 90, 125]) {
      const { client, pongs, socket } = await opened(service, `run${shift}`)
      socket.write(Buffer.concat([rawFrame(0x8a, Buffer.alloc(shift), MASK), ...parts, end()]))
      t.match(await client.expect('receipt'), { step: 1, applied: 1 })
      t.ok(client.updates.get(0)?.data.equals(BYTES), 'the update is the gradient')
      while (pongs.at(-1)?.length !== SIZES.at(-1)) await once(client.socket, 'pong')
      t.ok(pongs.every((data) => data.every((byte) => byte === data.length + 1)))
      await client.close()
    }
    await service.app.close()
  },
)

for (const path of ['in place', 'through plain ws'] as const) {
  t.test(`a flood of pings has its last one answered, and what follows it is read later, ${path}`, async (t) => {
    const service = await startService()
    // What comes with the upgrade is read by ws, and all that follows it, too.
    const socket = await upgraded(service, path === 'in place' ? Buffer.alloc(0) : ping(0))
    const received: Buffer[] = []
    socket.on('data', (bytes) => received.push(bytes))
    const heard = async (bytes: Buffer) => {
      while (!Buffer.concat(received).includes(bytes)) await once(socket, 'data')
    }
    const begun = performance.now()
    socket.write(Buffer.concat([...new Array<Buffer>(750).fill(ping(0)), ping(3)]))
    await heard(Buffer.of(0x8a, 3, 4, 4, 4))
    t.ok(Buffer.concat(received).length < 1000, `${Buffer.concat(received).length} bytes of answers`)
    socket.write(end())
    await heard(Buffer.from('FRAME_UNEXPECTED'))
    const elapsed = performance.now() - begun
    t.ok(elapsed > 1900, `${elapsed} ms, of 2000 in which 250 a second would have come`)
    socket.destroy()
    await service.app.close()
  })
}

t.test('a message in very many fragments is read at the rate of small frames, and is whole', async (t) => {
  const service = await startService()
  const { client, socket } = await opened(service, 'cut')
  const bytes = encodeFrame({ type: 'end', step: 1, skipped: new Array(300).fill(0) })
  const fragments = [...bytes].map((byte, i) => {
    const first = i === 0 ? 0x02 : i === bytes.length - 1 ? 0x80 : 0x00
    return rawFrame(first, Buffer.of(byte), MASK)
  })
  socket.write(Buffer.concat(fragments))
  t.match(await client.expect('receipt'), { step: 1, skipped: 1 })
  await client.close()
  await service.app.close()
})
