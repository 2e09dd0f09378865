import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import t from 'tap'
import { normal, RawClient, type Service, startService, told, turn } from '../service.js'
import { rawFrame, UPGRADE } from './websocket/raw-frame.js'

const ZERO = new Uint8Array(4)
const MOST = 2 ** 25
const GROUPS = [{ name: 'g', algorithm: 'sgd' }]
const PARAMETERS = [{ name: 'w', shape: [8], group: 'g' }]

const unfinished = async ({ metrics }: Service) => {
  const gauge = metrics.registry.getSingleMetric('muond_unfinished_bytes')
  const { values } = await gauge!.get()
  return values[0]!.value
}

/** An open stream to write bytes to. With `first` in the same packet as the request, ws reads it and not the in-place reader. */
async function stream(
  { http }: Service,
  first: Uint8Array = Buffer.alloc(0),
): Promise<{ socket: Socket; received: Buffer[] }> {
  const socket = connect(Number(new URL(http).port), '127.0.0.1')
  const received: Buffer[] = []
  socket.on('error', () => {})
  socket.write(Buffer.concat([Buffer.from(UPGRADE), first]))
  const [head] = await once(socket, 'data')
  if (!String(head).startsWith('HTTP/1.1 101')) throw new Error(String(head))
  socket.on('data', (bytes) => received.push(bytes))
  return { socket, received }
}

/** The first bytes of a binary message that has 16 MiB. */
const beginning = (bytes: number) => {
  const frame = rawFrame(0x82, Buffer.alloc(bytes), ZERO)
  frame.writeBigUInt64BE(BigInt(2 ** 24), 2)
  return frame
}

for (const path of ['in place', 'through plain ws'] as const) {
  t.test(`messages that do not end have a bound for the process, ${path}`, async (t) => {
    const service = await startService({ unfinished_bytes: MOST })
    const healthy = await RawClient.connect(service.url)
    await healthy.open({ run: 'healthy', groups: GROUPS, parameters: PARAMETERS })
    const ping = path === 'in place' ? undefined : rawFrame(0x89, Buffer.alloc(0), ZERO)
    const mebibytes = [9, 12, 8]
    const others = await Promise.all(mebibytes.map(() => stream(service, ping)))
    for (const [i, { socket }] of others.entries()) socket.write(beginning(mebibytes[i]! * 2 ** 20))
    while ((await unfinished(service)) < 29 * 2 ** 20) await turn()
    t.equal((await unfinished(service)) < MOST, true)
    const last = await stream(service, ping)
    last.socket.write(beginning(6 * 2 ** 20))
    await once(others[1]!.socket, 'close')
    const answer = Buffer.concat(others[1]!.received).toString('latin1')
    t.match(answer, /OVERLOADED.*unfinished messages take \d+ bytes, at most 33554432, and 12\d{6} of them are/s)
    t.equal(await told(service, 'OVERLOADED'), 1)
    const receipt = await healthy.step(1, [normal(1, 8)])
    t.equal(receipt.step, 1, 'who sends whole messages is let be')
    for (const { socket } of [...others, last]) socket.destroy()
    while ((await unfinished(service)) > 0) await turn()
    await healthy.close()
    await service.app.close()
  })
}

t.test('a message in many small pieces counts what the pieces take', async (t) => {
  const service = await startService({ unfinished_bytes: MOST })
  // ws itself takes no more than 16,384 fragments of one message.
  const fragments = new Array<Buffer>(764).fill(rawFrame(0x00, Buffer.alloc(1), ZERO))
  const message = Buffer.concat([rawFrame(0x02, Buffer.alloc(1), ZERO), ...fragments])
  const streams = await Promise.all(Array.from({ length: 43 }, () => stream(service)))
  const closed = streams.map(({ socket }) => once(socket, 'close'))
  for (const { socket } of streams) socket.write(message)
  await Promise.race(closed)
  for (const { socket } of streams) socket.destroy()
  t.equal(await told(service, 'OVERLOADED'), 1)
  await service.app.close()
})

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

t.test('every socket counts from its first byte, and a request must come', async (t) => {
  const service = await startService({ max_sockets: 3, open_timeout_seconds: 1 })
  const port = Number(new URL(service.http).port)
  const open = () => connect(port, '127.0.0.1').on('error', () => {})
  const silent = [open(), open(), open()]
  for (const socket of silent) socket.resume()
  silent[1]!.write('GET /livez HTTP/1.1\r\nHo')
  await Promise.all(silent.map((socket) => once(socket, 'connect')))
  const refused = open()
  await once(refused, 'close')
  t.equal((await service.metrics.refused_sockets_total.get()).values[0]!.value, 1)
  await Promise.all(silent.map((socket) => once(socket, 'close')))
  t.equal((await fetch(`${service.http}/livez`)).status, 200)
  await service.app.close()
})
