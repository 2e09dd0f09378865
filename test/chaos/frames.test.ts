import fc from 'fast-check'
import t from 'tap'
import { type RawData, type WebSocket, WebSocketServer } from 'ws'
import { encodeFrame, encodeHeader } from '../../src/wire/codec.js'
import { type Frame, FrameSplitter, isControl, labelOf, type Piece, shorten } from './frames.js'

const HEAD = Buffer.from('GET /v1/stream HTTP/1.1\r\nupgrade: websocket\r\n\r\n')
/** Payload lengths around those from which a frame's head is longer. */
const LENGTHS = [0, 1, 125, 126, 127, 65_535, 65_536, 70_000]

/** The bytes of a frame by the figure of RFC 6455, section 5.2. */
function frameOf(
  payload: Uint8Array,
  { fin = true, opcode = 2, key }: { fin?: boolean; opcode?: number; key?: Buffer },
) {
  const { length } = payload
  const extended = Buffer.alloc(length > 0xffff ? 8 : length > 125 ? 2 : 0)
  if (extended.length === 8) extended.writeBigUInt64BE(BigInt(length))
  if (extended.length === 2) extended.writeUInt16BE(length)
  const short = extended.length === 8 ? 127 : extended.length === 2 ? 126 : length
  const masked = key ? payload.map((byte, i) => byte ^ key[i % 4]) : payload
  const head = Buffer.from([(fin ? 0x80 : 0) | opcode, (key ? 0x80 : 0) | short])
  return Buffer.concat([head, extended, key ?? Buffer.alloc(0), masked])
}

function split(bytes: Buffer, cuts: readonly number[] = []): Piece[] {
  const splitter = new FrameSplitter()
  const ends = [...cuts, bytes.length].sort((a, b) => a - b)
  const pieces = ends.flatMap((end, i) => splitter.push(bytes.subarray(ends[i - 1] ?? 0, end)))
  t.equal(splitter.rest.length, 0)
  return pieces
}

const random = (length: number) => Buffer.from(Array.from({ length }, (_, i) => (i * 167 + 13) & 0xff))

t.test('a connection is cut into its frames, however its bytes arrive', async (t) => {
  const frame = fc.record({
    payload: fc.uint8Array({ maxLength: 300 }),
    fin: fc.boolean(),
    opcode: fc.constantFrom(0, 1, 2, 8, 9, 10),
    key: fc.option(fc.uint8Array({ minLength: 4, maxLength: 4 }), { nil: undefined }),
  })
  fc.assert(
    fc.property(fc.array(frame), fc.array(fc.nat(2000)), (frames, cuts) => {
      const encoded = frames.map(({ payload, key, ...of }) => frameOf(payload, { ...of, key: key && Buffer.from(key) }))
      const bytes = Buffer.concat([HEAD, ...encoded])
      const [head, ...pieces] = split(
        bytes,
        cuts.filter((cut) => cut < bytes.length),
      )
      t.same(head, { kind: 'head', bytes: HEAD })
      t.same(
        pieces,
        frames.map(({ payload, fin, opcode }, i) => {
          return { kind: 'frame', bytes: encoded[i], opcode, fin, payload: Buffer.from(payload) }
        }),
      )
    }),
    { numRuns: 200, seed: 7 },
  )
})

t.test('lengths of every size are read, and what is not whole stays', async (t) => {
  for (const length of LENGTHS) {
    for (const key of [undefined, random(4)]) {
      const bytes = frameOf(random(length), { key })
      const splitter = new FrameSplitter()
      splitter.push(HEAD)
      t.same(splitter.push(bytes.subarray(0, -1)), [], `${length} bytes`)
      t.equal(splitter.rest.length, bytes.length - 1)
      const [piece] = splitter.push(bytes.subarray(-1)) as [Frame]
      t.ok(piece.payload.equals(random(length)))
    }
  }
})

t.test('a shortened frame is a frame with the first bytes of the payload', async (t) => {
  for (const length of LENGTHS.filter((length) => length > 0)) {
    for (const key of [undefined, random(4)]) {
      const [, frame] = split(Buffer.concat([HEAD, frameOf(random(length), { fin: false, opcode: 0, key })]))
      for (const shorter of [0, 125, 126, 65_535, 65_536, length - 1].filter((shorter) => shorter < length)) {
        const bytes = shorten(frame as Frame, shorter)
        const [, again] = split(Buffer.concat([HEAD, bytes]))
        t.match(again, { kind: 'frame', opcode: 0, fin: false, bytes })
        t.ok((again as Frame).payload.equals(random(length).subarray(0, shorter)), `${shorter} of ${length} bytes`)
      }
    }
  }
})

t.test('what ws receives of a shortened frame is its first bytes', async (t) => {
  const server = new WebSocketServer({ noServer: true })
  // The frame is pushed into a socket of ws, which is the oracle of its meaning.
  const { Duplex } = await import('node:stream')
  const stream = new Duplex({ read: () => {}, write: (_chunk, _encoding, done) => done() })
  const upgrade = {
    method: 'GET',
    headers: { upgrade: 'websocket', 'sec-websocket-key': 'AAAAAAAAAAAAAAAAAAAAAA==', 'sec-websocket-version': '13' },
  }
  const socket = await new Promise<WebSocket>((resolve) => {
    server.handleUpgrade(upgrade as never, stream as never, Buffer.alloc(0), resolve)
  })
  const [, frame] = split(Buffer.concat([HEAD, frameOf(random(70_000), { key: random(4) })]))
  for (const shorter of [0, 100, 200, 66_000]) {
    const received = new Promise<RawData>((resolve) => socket.once('message', resolve))
    stream.push(shorten(frame as Frame, shorter))
    t.ok(((await received) as Buffer).equals(random(70_000).subarray(0, shorter)), `${shorter} bytes`)
  }
  socket.terminate()
})

t.test('a frame says what it is in its first bytes', async (t) => {
  const gradient = { type: 'gradient', parameter: 3, step: 300, offset: 70_000 } as const
  t.same(labelOf(encodeHeader(gradient, 1000)), gradient, 'without its data')
  t.same(labelOf(encodeFrame({ type: 'end', step: 7, skipped: [1] })), { type: 'end', step: 7 })
  t.same(labelOf(encodeFrame({ type: 'checkpoint' })), { type: 'checkpoint' })
  const step = { type: 'step', step: 2, groups: { muon: { lr: 0.5 } }, gradient_scale: 2 } as const
  t.same(labelOf(encodeFrame(step)), { type: 'step', step: 2 })
  const nonsense = [
    Buffer.alloc(0),
    Buffer.from([0x81]),
    Buffer.from('no frame'),
    Buffer.from([0x81, 0xa1, 0x61, 0x05]),
  ]
  for (const bytes of nonsense) t.equal(labelOf(bytes), undefined, bytes.toString('hex'))
})

t.test('pings, pongs and closes are control frames', async (t) => {
  const kinds = [0, 1, 2, 8, 9, 10].map(
    (opcode) => split(Buffer.concat([HEAD, frameOf(random(3), { opcode })]))[1] as Frame,
  )
  t.same(kinds.map(isControl), [false, false, false, true, true, true])
})
