import { createHash } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { createServer } from 'node:http'
import { type AddressInfo, connect, Socket } from 'node:net'
import { Duplex } from 'node:stream'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { type ServerOptions, WebSocket, WebSocketServer } from 'ws'
import { bytesTaken, InPlaceWebSocket } from '../../../src/link/websocket/socket.js'
import { encodeHeader, peekGradient } from '../../../src/wire/codec.js'
import { hideReadFields, randomBytes, rawFrame, rawGradient } from './raw-frame.js'

const zero = new Uint8Array(4)
const mask = Uint8Array.from([0xa1, 0, 0x5c, 0xff])
const UPGRADE =
  'GET / HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n' +
  'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n'

/** Without pings that have another one right behind them: those need no answer, and may have no event. */
const answered = (events: readonly string[]) =>
  events.filter((event, i) => !(event.startsWith('ping') && events[i + 1]?.startsWith('ping')))

for (const plain of [false, true]) {
  t.test(
    `any frames in any splits arrive whole and in order, ${plain ? 'through plain ws' : 'in place'}`,
    async (t) => {
      const { server, accept } = await listen(t, { plain })
      const key = fc.constantFrom(zero, mask)
      const frame = fc.record({
        kind: fc.constantFrom(
          'gradient' as const,
          'refused' as const,
          'text' as const,
          'ping' as const,
          'pause' as const,
        ),
        length: fc.oneof(fc.nat({ max: 200 }), fc.integer({ min: 60_000, max: 400_000 })),
        mask: key,
        fragments: fc.boolean(),
      })
      const frames = fc.array(frame, { minLength: 1, maxLength: 10 })
      const splits = fc.array(fc.oneof(fc.integer({ min: 1, max: 30 }), fc.integer({ min: 1, max: 200_000 })), {
        minLength: 1,
        maxLength: 10,
      })
      const property = fc.asyncProperty(frames, splits, fc.nat(), async (frames, splits, seed) => {
        const accepted = accept()
        const client = await upgrade(server)
        const connection = await accepted
        const log = record(connection, ({ parameter }) => frames[parameter]?.kind !== 'refused')
        const sent = frames.map((frame, i) => encode(frame, i, randomBytes(frame.length, seed + i)))
        await send(
          client,
          Buffer.concat([...sent.map(({ bytes }) => bytes), rawFrame(0x81, Buffer.from('end'), mask)]),
          splits,
        )
        while (log.events.at(-1) !== `text ${sha1('end')}`) await once(log, 'event')
        client.destroy()
        await once(connection, 'close')
        const placed = frames.filter(({ kind, length }) => kind === 'gradient' && length >= 65_536).length
        t.equal(connection.inPlace, !plain)
        t.equal(log.placed, plain ? 0 : placed)
        t.same(answered(log.events), answered([...sent.map(({ event }) => event), `text ${sha1('end')}`]))
      })
      await fc.assert(property, { seed: 5, numRuns: 25 })
    },
  )
}

t.test('a stock WebSocket client is received in place, in one message and in two fragments', async (t) => {
  const { server, accept } = await listen(t)
  const accepted = accept()
  const client = new WebSocket(server)
  const connection = await accepted
  const log = record(connection)
  await once(client, 'open')
  const data = Buffer.from(randomBytes(5 * 2 ** 20, 3))
  const header = encodeHeader({ type: 'gradient', parameter: 0, step: 1, offset: 0 }, data.length)
  client.send(Buffer.concat([header, data]))
  client.send(header, { fin: false })
  client.send(data, { fin: true })
  while (log.events.length < 2) await once(log, 'event')
  t.equal(log.placed, 2)
  t.same(log.events, [`gradient ${sha1(data)}`, `gradient ${sha1(data)}`])
  client.terminate()
})

t.test('without a sink every frame is an ordinary message', async (t) => {
  const { server, accept } = await listen(t)
  const accepted = accept()
  const client = await upgrade(server)
  const connection = await accepted
  const gradient = rawGradient(0, randomBytes(100_000, 1), { mask })
  client.write(gradient)
  const [message] = await once(connection, 'message')
  t.equal(message.length, gradient.length - 14)
  client.destroy()
})

t.test('nothing is read while paused, not even into a destination', async (t) => {
  const { server, accept } = await listen(t)
  const accepted = accept()
  const client = await upgrade(server)
  const connection = await accepted
  const target = new Uint8Array(32 * 2 ** 20)
  const received = new Promise((resolve) => {
    connection.sink = { destination: () => target, received: resolve }
  })
  const data = new Uint8Array(target.length).fill(7)
  connection.once('message', () => connection.pause())
  const pausing = once(connection, 'message')
  client.write(rawFrame(0x81, Buffer.from('pause'), mask))
  await pausing
  client.write(rawGradient(0, data, { mask: zero }))
  const probe = await upgrade(server)
  probe.destroy()
  await once(probe, 'close')
  t.equal(target.indexOf(7), -1)
  t.ok(client.writableLength > 0, 'the client feels it')
  connection.resume()
  await received
  t.ok(Buffer.from(data).equals(target))
  client.destroy()
})

t.test('close() and terminate() let go of a half-received gradient, and its memory is not written again', async (t) => {
  for (const end of ['close', 'terminate'] as const) {
    const { server, accept } = await listen(t)
    const accepted = accept()
    const client = await upgrade(server)
    const connection = await accepted
    const target = new Uint8Array(2 ** 20)
    const asked = new Promise<void>((resolve) => {
      const destination = () => {
        resolve()
        return target
      }
      connection.sink = { destination, received: () => t.fail('it was not complete') }
    })
    const bytes = rawGradient(0, new Uint8Array(target.length).fill(7), { mask: zero })
    client.write(bytes.subarray(0, 1000))
    await asked
    if (end === 'close') connection.close(4409, 'taken over')
    else connection.terminate()
    target.fill(1)
    client.resume()
    const closed = once(connection, 'close')
    if (end === 'close')
      client.write(Buffer.concat([bytes.subarray(1000), rawFrame(0x88, Buffer.from([0x11, 0x39]), mask)]))
    await closed
    t.equal(
      target.findIndex((byte) => byte !== 1),
      -1,
      end,
    )
    client.destroy()
  }
})

t.test('after close() gradients are ordinary messages again', async (t) => {
  const { server, accept } = await listen(t)
  const accepted = accept()
  const client = await upgrade(server)
  const connection = await accepted
  connection.sink = { destination: () => t.fail('asked'), received: () => t.fail('received') } as never
  connection.close(1000)
  client.write(rawGradient(0, randomBytes(70_000, 1), { mask }))
  const [message] = await once(connection, 'message')
  t.match(peekGradient(message), { parameter: 0, dataLength: 70_000 })
  client.destroy()
})

t.test('a connection lost in the middle of a gradient closes, and the gradient never counts as received', async (t) => {
  const { server, accept } = await listen(t)
  const accepted = accept()
  const client = await upgrade(server)
  const connection = await accepted
  const log = record(connection)
  client.end(rawGradient(0, randomBytes(300_000, 5), { mask }).subarray(0, 250_000))
  const [code] = await once(connection, 'close')
  t.equal(code, 1006)
  t.same(log.events, [])
  client.destroy()
})

t.test('what breaks the rules of WebSocket is closed as ws closes it', async (t) => {
  const data = randomBytes(100_000, 1)
  const header = encodeHeader({ type: 'gradient', parameter: 0, step: 1, offset: 0 }, data.length)
  const whole = rawGradient(0, data, { mask })
  const cases: [string, Buffer, number][] = [
    ['no mask', rawGradient(0, data, {}), 1002],
    ['no mask on the data', Buffer.concat([rawFrame(0x02, header, mask), rawFrame(0x80, data)]), 1002],
    ['too long', rawGradient(0, randomBytes(300_000, 1), { mask }), 1009],
    ['a reserved bit', Buffer.concat([Buffer.from([0xc2]), whole.subarray(1)]), 1002],
    ['a continuation of nothing', Buffer.concat([whole, rawFrame(0x80, data, mask)]), 1002],
    ['text that is not UTF-8', Buffer.concat([whole, rawFrame(0x81, Uint8Array.from([0xff]), mask)]), 1007],
  ]
  for (const [name, bytes, code] of cases) {
    const { server, accept } = await listen(t, { options: { maxPayload: 200_000 } })
    const accepted = accept()
    const client = await upgrade(server)
    const connection = await accepted
    record(connection)
    const failed = once(connection, 'error')
    client.write(bytes)
    await failed
    const reply = await read(client, 4)
    t.equal(reply.readUInt16BE(2), code, name)
    client.destroy()
  }
})

t.test('what has come with the upgrade is received in place as well, across pauses', async (t) => {
  const frame = (data: Uint8Array, i: number) => encode({ kind: 'gradient', mask, fragments: i % 2 > 0 }, i, data)
  for (const isLate of [false, true]) {
    const { server, accept } = await listen(t, { isLate })
    const sent = [70_000, 300_000, 100_000].map((length, i) => frame(randomBytes(length, i), i))
    const pause = rawFrame(0x81, Buffer.from('pause'), mask)
    const bytes = Buffer.concat([pause, pause, ...sent.map(({ bytes }) => bytes), pause])
    const attached: ReturnType<typeof record>[] = []
    const accepted = accept((connection) => attached.push(record(connection)))
    const client = await upgrade(server, '', bytes)
    const connection = await accepted
    const [log] = attached
    while (log!.events.length < 6) await once(log!, 'event')
    t.equal(connection.inPlace, true)
    t.equal(log!.placed, 3)
    const text = `text ${sha1('pause')}`
    t.same(log!.events, [text, text, ...sent.map(({ event }) => event), text])
    client.destroy()
  }
})

t.test('plain ws serves what the kernel cannot be let into', async (t) => {
  const cases: [string, { options?: ServerOptions; plain?: boolean; headers?: string }][] = [
    [
      'compression',
      { options: { perMessageDeflate: true }, headers: 'Sec-WebSocket-Extensions: permessage-deflate\r\n' },
    ],
    ['deferred events', { options: { allowSynchronousEvents: false } }],
    ['a socket without the fields of onread', { plain: true }],
  ]
  for (const [name, { headers, ...options }] of cases) {
    const { server, accept } = await listen(t, options)
    const messages: Promise<unknown[]>[] = []
    const accepted = accept((connection) => messages.push(once(connection, 'message')))
    const client = await upgrade(server, headers)
    const connection = await accepted
    client.write(rawFrame(0x82, Buffer.from('hello'), mask))
    const [message] = await messages[0]!
    t.equal(String(message), 'hello', name)
    t.equal(connection.inPlace, false)
    client.destroy()
  }
})

t.test('a stream that is no socket, or a socket without a handle, is plain', async (t) => {
  for (const stream of [new Duplex({ read: () => undefined, write: () => undefined }), new Socket()]) {
    const connection: InPlaceWebSocket = Reflect.construct(InPlaceWebSocket, [null, undefined, {}])
    connection.setSocket(stream, Buffer.alloc(0), { allowSynchronousEvents: true, maxPayload: 0 })
    t.equal(connection.inPlace, false)
    connection.abandon()
    connection.redirect(() => new Uint8Array(0))
    connection.terminate()
  }
  t.equal(bytesTaken(new Socket()), 0, 'a socket without a handle has sent nothing')
})

type Frame = { kind: 'gradient' | 'refused' | 'text' | 'ping' | 'pause'; mask: Uint8Array; fragments: boolean }

function encode({ kind, mask, fragments }: Frame, index: number, data: Uint8Array): { bytes: Buffer; event: string } {
  if (kind === 'gradient' || kind === 'refused') {
    return { bytes: rawGradient(index, data, { mask, fragments }), event: `gradient ${sha1(data)}` }
  }
  if (kind === 'ping')
    return { bytes: rawFrame(0x89, data.subarray(0, 125), mask), event: `ping ${sha1(data.subarray(0, 125))}` }
  const text = Buffer.from(kind === 'pause' ? 'pause' : data.map((byte) => byte & 0x7f))
  return { bytes: rawFrame(0x81, text, mask), event: `text ${sha1(text)}` }
}

/** Records everything that arrives, in order, and pauses for a turn of the event loop where a test says so. */
function record(connection: InPlaceWebSocket, wanted: (head: { parameter: number }) => boolean = () => true) {
  const log = Object.assign(new EventEmitter(), { events: [] as string[], placed: 0 })
  const note = (event: string) => {
    log.events.push(event)
    log.emit('event')
  }
  const targets: Uint8Array[] = []
  const pauseForATurn = () => {
    connection.pause()
    setImmediate(() => connection.resume())
  }
  connection.sink = {
    destination: (head) => {
      if (!wanted(head)) return undefined
      if (head.parameter % 2 === 1) pauseForATurn()
      const arena = new SharedArrayBuffer(head.dataLength + 64)
      targets.push(new Uint8Array(arena, 13, head.dataLength))
      return targets.at(-1)
    },
    received: () => {
      log.placed += 1
      note(`gradient ${sha1(targets.at(-1)!)}`)
    },
  }
  connection.on('ping', (data) => note(`ping ${sha1(data)}`))
  connection.on('error', () => undefined)
  connection.on('message', (data: Buffer, isBinary) => {
    const head = isBinary ? peekGradient(data) : undefined
    note(typeof head === 'object' ? `gradient ${sha1(data.subarray(head.dataStart))}` : `text ${sha1(data)}`)
    if (String(data.subarray(0, 6)) === 'pause') pauseForATurn()
  })
  return log
}

type Listening = {
  options?: ServerOptions
  plain?: boolean
  /** Whether requests are upgraded once more than them has come. */
  isLate?: boolean
}

async function listen(t: Test, { options, plain = false, isLate = false }: Listening = {}) {
  const wss = new WebSocketServer({ ...options, noServer: true, WebSocket: InPlaceWebSocket as typeof WebSocket })
  const http = createServer()
  http.on('upgrade', async (request, socket, head) => {
    while (isLate && socket.readableLength === 0) await new Promise((resolve) => setImmediate(resolve))
    wss.handleUpgrade(request, socket, head, (connection) => wss.emit('connection', connection, request))
  })
  http.listen(0, '127.0.0.1')
  await once(http, 'listening')
  if (plain) wss.on('headers', (_, request) => hideReadFields(request.socket))
  t.teardown(() => {
    for (const client of wss.clients) client.terminate()
    http.close()
  })
  const accept = (attach?: (connection: InPlaceWebSocket) => void) =>
    new Promise<InPlaceWebSocket>((resolve) => {
      wss.once('connection', (connection) => {
        attach?.(connection as InPlaceWebSocket)
        resolve(connection as InPlaceWebSocket)
      })
    })
  return { server: `ws://127.0.0.1:${(http.address() as AddressInfo).port}`, accept }
}

async function upgrade(server: string, headers = '', head: Uint8Array = new Uint8Array(0)): Promise<Socket> {
  const socket = connect(Number(new URL(server).port), '127.0.0.1')
  socket.write(Buffer.concat([Buffer.from(`${UPGRADE}${headers}\r\n`), head]))
  let reply = ''
  while (!reply.endsWith('\r\n\r\n')) reply += (await read(socket, 1)).toString('latin1')
  return socket
}

async function read(socket: Socket, bytes: number): Promise<Buffer> {
  for (;;) {
    const chunk: Buffer | null = socket.read(bytes)
    if (chunk) return chunk
    await once(socket, 'readable')
  }
}

async function send(socket: Socket, bytes: Buffer, splits: readonly number[]): Promise<void> {
  socket.setNoDelay()
  for (let at = 0, turn = 0; at < bytes.length; turn++) {
    // Tiny writes to the end would only take time: a hundred of them, then the rest.
    const part = turn < 100 ? bytes.subarray(at, at + splits[turn % splits.length]!) : bytes.subarray(at)
    at += part.length
    await new Promise((resolve) => socket.write(part, resolve))
  }
}

function sha1(bytes: Uint8Array | string): string {
  return createHash('sha1').update(bytes).digest('hex')
}
