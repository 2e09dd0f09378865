import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import t from 'tap'
import { encodeFrame } from '../../src/wire/codec.js'
import { MESSAGE_BYTES, type OpenFrame } from '../../src/wire/frame.js'
import { normal, RawClient, type Service, startService, told, turn } from '../service.js'
import { hideReadFields, rawFrame, UPGRADE } from './websocket/raw-frame.js'

const ZERO = new Uint8Array(4)
const MIB = 2 ** 20
/** Room for one message of a stranger, and for one of a member. */
const ROOM = 32 * MIB
const GROUPS = [{ name: 'g', algorithm: 'sgd' }]
const PARAMETERS = [{ name: 'w', shape: [8], group: 'g' }]

const taken = async ({ metrics }: Service) => {
  const gauge = metrics.registry.getSingleMetric('muond_unfinished_bytes')
  const { values } = await gauge!.get()
  return values[0]!.value
}

type Stream = { socket: Socket; text(): string }

/** An open stream to write bytes to; `first` are in the same packet as the request. */
async function stream({ http }: Service, first: Uint8Array = Buffer.alloc(0)): Promise<Stream> {
  const socket = connect(Number(new URL(http).port), '127.0.0.1')
  const received: Buffer[] = []
  socket.on('error', () => {})
  socket.write(Buffer.concat([Buffer.from(UPGRADE), first]))
  const [head] = await once(socket, 'data')
  if (!String(head).startsWith('HTTP/1.1 101')) throw new Error(String(head))
  socket.on('data', (bytes) => received.push(bytes))
  return { socket, text: () => Buffer.concat(received).toString('latin1') }
}

/** Resolves when a stream has been sent a text. */
async function heard({ socket, text }: Stream, part: string): Promise<void> {
  while (!text().includes(part) && !socket.destroyed) await Promise.race([once(socket, 'data'), once(socket, 'close')])
}

/** The first bytes, 64 KiB or more, of a binary message that has 15 MiB. */
const beginning = (bytes: number) => {
  const frame = rawFrame(0x82, Buffer.alloc(bytes), ZERO)
  frame.writeBigUInt64BE(BigInt(15 * MIB), 2)
  return frame
}

/** An `open` of so many parameters that its message needs room. */
const largeOpen = (run: string, parameters = 5000): Buffer => {
  const open: OpenFrame = {
    ...{ type: 'open', protocol: 1, run, groups: GROUPS },
    parameters: Array.from({ length: parameters }, (_, i) => ({ name: `w${i}`, shape: [1], group: 'g' })),
  }
  return rawFrame(0x82, encodeFrame(open), ZERO)
}

const member = async (service: Service, run: string, parameters = PARAMETERS) => {
  const client = await RawClient.connect(service.url)
  await client.open({ run, groups: GROUPS, parameters })
  return client
}

t.test('messages that do not end hold their room only as long as nobody waits for it', async (t) => {
  const service = await startService({ unfinished_bytes: ROOM })
  const healthy = await member(service, 'healthy')
  const first = await stream(service)
  first.socket.write(beginning(4 * MIB))
  while ((await taken(service)) === 0) await turn()
  const [second, third] = [await stream(service), await stream(service)]
  // With the upgrade as well as after it: no way around the room.
  const fourth = await stream(service, beginning(MIB))
  second.socket.write(beginning(4 * MIB))
  const ended = [first, fourth].map(({ socket }) => once(socket, 'close'))
  while (second.socket.writableLength === 0) await turn()
  third.socket.write(largeOpen('large'))
  t.ok((await taken(service)) <= MESSAGE_BYTES, 'strangers have half of the room')
  t.equal((await healthy.step(1, [normal(1, 8)])).step, 1)
  await heard(third, 'opened')
  await Promise.all(ended)
  t.match(
    first.text(),
    /OVERLOADED.*large messages take 15\d+ bytes, at most 33554432, and a connection with 15\d+ of them sends too slowly/s,
  )
  t.equal(await told(service, 'OVERLOADED'), 2, 'nobody waits for what the second has')
  for (const { socket } of [second, third]) socket.destroy()
  while ((await taken(service)) > 0) await turn()
  await healthy.close()
  await service.app.close()
})

t.test('who has a run goes before those who have none', async (t) => {
  const service = await startService({ unfinished_bytes: ROOM, chunk_bytes: 16 * MIB })
  const values = normal(2, (15 * MIB) / 4)
  const parameters = [{ name: 'w', shape: [values.length], group: 'g' }]
  const [first, second] = [await member(service, 'first', parameters), await member(service, 'second', parameters)]
  const stranger = await stream(service)
  stranger.socket.write(beginning(14 * MIB))
  while ((await taken(service)) === 0) await turn()
  const waiting = await stream(service)
  waiting.socket.write(beginning(MIB))
  await Promise.all(
    [first, second].map(async (client) => t.equal((await client.step(1, [values], [0], 16 * MIB)).applied, 1)),
  )
  for (const { socket } of [stranger, waiting]) socket.destroy()
  for (const client of [first, second]) await client.close()
  while ((await taken(service)) > 0) await turn()
  await service.app.close()
})

t.test('a slow member gives its room to another one', async (t) => {
  const service = await startService({ unfinished_bytes: ROOM })
  const slow = await Promise.all(['first', 'second'].map((run) => member(service, run)))
  for (const { socket } of slow) Reflect.get(socket, '_socket').write(beginning(MIB))
  while ((await taken(service)) < 30 * MIB) await turn()
  const other = await member(service, 'other')
  // A gradient would need no room: it is received where it belongs.
  Reflect.get(other.socket, '_socket').write(rawFrame(0x82, Buffer.alloc(15 * MIB), ZERO))
  const [ended, read] = await Promise.all([Promise.race(slow.map((client) => client.closed())), other.closed()])
  t.equal(ended.code, 1013)
  t.equal(read.code, 1002, 'the other one was read, and is no frame')
  for (const { socket } of slow) socket.terminate()
  await service.app.close()
})

t.test('an open that is refused takes the time of those who come after it', async (t) => {
  const service = await startService({ max_parameters: 4999 })
  const open = largeOpen('refused')
  const begun = performance.now()
  for (let i = 0; i < 3; i++) {
    const one = await stream(service)
    one.socket.write(open)
    await heard(one, 'OVER_CAPACITY')
    one.socket.destroy()
  }
  // The first is read at once, and each after it when the one before has been paid for, at 4 MiB a second.
  t.ok(performance.now() - begun >= (2 * open.length) / ((4 * MIB) / 1000))
  const small = await member(service, 'small')
  t.equal((await small.step(1, [normal(1, 8)])).step, 1, 'small ones need no room')
  await small.close()
  await service.app.close()
})

t.test('who waits for room is told so when the time to open a run is over', async (t) => {
  const service = await startService({ unfinished_bytes: ROOM, open_timeout_seconds: 0.4 })
  const holder = await stream(service)
  holder.socket.write(beginning(MIB))
  const waiting = await stream(service)
  while ((await taken(service)) === 0) await turn()
  waiting.socket.write(beginning(MIB))
  await heard(waiting, 'OVERLOADED')
  t.match(waiting.text(), /nothing was opened within 0.4 seconds: a message of 15\d+ bytes has waited for others/)
  for (const { socket } of [holder, waiting]) socket.destroy()
  await service.app.close()
})

t.test('a message in many small pieces needs the room that it may come to', async (t) => {
  const service = await startService({ unfinished_bytes: ROOM })
  const fragments = new Array<Buffer>(100).fill(rawFrame(0x00, Buffer.alloc(1), ZERO))
  const message = Buffer.concat([rawFrame(0x02, Buffer.alloc(1), ZERO), ...fragments])
  const streams = [await stream(service), await stream(service)]
  const closed = streams.map(({ socket }) => once(socket, 'close'))
  for (const { socket } of streams) socket.write(message)
  await Promise.race(closed)
  for (const { socket } of streams) socket.destroy()
  t.equal(await told(service, 'OVERLOADED'), 1)
  await service.app.close()
})

t.test('a socket that is not read in place is ended once there is no room', async (t) => {
  const service = await startService({ unfinished_bytes: ROOM })
  service.app.websocketServer.on('headers', (_, request) => hideReadFields(request.socket))
  const healthy = await member(service, 'healthy')
  const streams = await Promise.all([9, 12].map(() => stream(service)))
  streams[0]!.socket.write(beginning(9 * MIB))
  while ((await taken(service)) < 9 * MIB) await turn()
  streams[1]!.socket.write(beginning(12 * MIB))
  await once(streams[1]!.socket, 'close')
  t.match(streams[1]!.text(), /OVERLOADED.*large messages take \d+ bytes, at most 33554432.* found no room/s)
  t.equal((await healthy.step(1, [normal(1, 8)])).step, 1, 'who sends whole messages is let be')
  streams[0]!.socket.destroy()
  while ((await taken(service)) > 0) await turn()
  await healthy.close()
  await service.app.close()
})
