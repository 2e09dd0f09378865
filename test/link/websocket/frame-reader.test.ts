import { createHash } from 'node:crypto'
import fc from 'fast-check'
import t from 'tap'
import { FrameReader } from '../../../src/link/websocket/frame-reader.js'
import { IN_PLACE_BYTES, UNDECIDED_BYTES } from '../../../src/link/websocket/gradient-frame.js'
import { randomBytes, rawFrame, rawGradient } from './raw-frame.js'

type Event = { ordinary: Buffer } | { placed: Buffer }

t.test('however the bytes are split, every gradient is placed and the rest is forwarded, in order', async () => {
  const key = fc.constantFrom(new Uint8Array(4), Uint8Array.from([1, 2, 3, 4]), Uint8Array.from([0, 0, 0, 255]))
  const gradient = fc.record({
    kind: fc.constantFrom('gradient' as const, 'refused' as const),
    length: fc.integer({ min: IN_PLACE_BYTES, max: 3 * IN_PLACE_BYTES }),
    fragments: fc.boolean(),
    mask: key,
  })
  const ordinary = fc.record({
    kind: fc.constantFrom('text' as const, 'ping' as const, 'fragments' as const),
    length: fc.oneof(fc.nat({ max: 125 }), fc.nat({ max: 2 * IN_PLACE_BYTES })),
    mask: key,
  })
  const pieces = fc.array(fc.oneof(gradient, ordinary), { minLength: 1, maxLength: 8 })
  const splits = fc.array(fc.oneof(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 90_000 })), {
    minLength: 1,
    maxLength: 40,
  })
  fc.assert(
    fc.property(pieces, splits, fc.nat(), (pieces, splits, seed) => {
      const sent: Buffer[] = []
      const expected: Event[] = []
      for (const [index, piece] of pieces.entries()) {
        const data = randomBytes(piece.length, seed + index)
        const bytes = encode(piece, index, data)
        sent.push(bytes)
        expected.push(piece.kind === 'gradient' ? { placed: Buffer.from(data) } : { ordinary: bytes })
      }
      const refused = new Set(pieces.flatMap(({ kind }, index) => (kind === 'refused' ? [index] : [])))
      const { seen, skipped } = receive(Buffer.concat(sent), splits, refused)
      const [got, asked] = [sorted(seen), sorted(expected)]
      const same = JSON.stringify(digest(merged(got.rest))) === JSON.stringify(digest(merged(asked.rest)))
      // A ping that was skipped had another one right behind it.
      return same && got.pings.length + skipped.length === asked.pings.length
    }),
    { seed: 11, numRuns: 60 },
  )
})

t.test('of pings that come in one read the last one is forwarded, whole, wherever the scratch ends', async (t) => {
  const [mask, zero] = [Uint8Array.from([9, 0, 7, 255]), new Uint8Array(4)]
  const pings = Array.from({ length: 126 }, (_, size) => rawFrame(0x89, randomBytes(size, size), mask))
  const pongs = pings.map((ping) => Buffer.concat([Buffer.of(0x8a), ping.subarray(1)]))
  const gradient = (parameter: number, fragments: boolean) =>
    rawGradient(parameter, randomBytes(IN_PLACE_BYTES, parameter), { mask: zero, fragments })
  const rest = [...pings, gradient(0, false), ...pongs, ...pings, gradient(1, true), ...pings, ...pongs]
  const placed = [0, 1].map((seed) => ({ placed: Buffer.from(randomBytes(IN_PLACE_BYTES, seed)) }))
  const bytesOfPings = Buffer.concat(pings).length
  // The border of the first read falls on every byte of the pings, headers included.
  for (let border = 0; border <= bytesOfPings; border++) {
    const { reader, events, skipped } = recording()
    const filler = rawFrame(0x82, new Uint8Array(reader.next().length - border - 8), zero)
    feed(reader, Buffer.concat([filler, ...rest]))
    const { rest: others, pings: forwarded } = sorted(events)
    t.same(digest(others), digest([{ ordinary: filler }, ...placed]))
    t.ok(forwarded.every((ping) => pings.some((sent) => sent.equals(ping))))
    // One of each group, and one more where a read ends within a group.
    t.ok(forwarded.length >= 3 && forwarded.length <= 6, `${forwarded.length} pings`)
    t.equal(forwarded.length + skipped.length, 5 * 126)
    t.ok(pings.at(-1)!.equals(forwarded.at(-1)!), 'the last of all is answered')
  }
})

t.test(
  'an abandoned gradient is dropped to its end, its memory is written no more, and the next one arrives',
  async (t) => {
    const first = randomBytes(2 * IN_PLACE_BYTES, 1)
    const second = randomBytes(IN_PLACE_BYTES, 2)
    const stream = Buffer.concat([
      rawGradient(0, first, { mask: Uint8Array.from([9, 8, 7, 6]) }),
      rawGradient(1, second, { mask: new Uint8Array(4) }),
    ])
    for (const at of [200, 70_000, first.length - 100]) {
      const { reader, events, targets } = recording()
      feed(reader, stream.subarray(0, at))
      const before = Buffer.from(targets[0]!)
      t.equal(reader.abandon(), true)
      t.equal(reader.abandon(), false, 'only once')
      feed(reader, stream.subarray(at))
      t.ok(before.equals(targets[0]!), `abandoned after ${at} bytes`)
      t.same(digest(events), digest([{ placed: Buffer.from(second) }]))
    }
  },
)

t.test('a redirected gradient goes on in other memory, with all that has come of it', async (t) => {
  const data = randomBytes(2 * IN_PLACE_BYTES, 1)
  const stream = rawGradient(0, data, { mask: Uint8Array.from([9, 8, 7, 6]) })
  for (const at of [200, 70_000, stream.length - 100]) {
    const { reader, events, targets } = recording()
    feed(reader, stream.subarray(0, at))
    const before = Buffer.from(targets[0]!)
    const other = new Uint8Array(data.length)
    t.equal(
      reader.redirect(({ dataLength }) => other.subarray(0, dataLength)),
      true,
    )
    feed(reader, stream.subarray(at))
    t.ok(before.equals(targets[0]!), `the first memory is written no more after ${at} bytes`)
    t.ok(Buffer.from(data).equals(other))
    t.equal(events.length, 1)
  }
})

t.test('without a gradient at work there is nothing to abandon or to redirect', async (t) => {
  const { reader } = recording()
  t.equal(reader.abandon(), false)
  t.equal(
    reader.redirect(() => new Uint8Array(0)),
    false,
  )
  feed(reader, rawFrame(0x82, randomBytes(1000, 1), new Uint8Array(4)).subarray(0, 500))
  t.equal(reader.abandon(), false)
})

t.test(
  'the buffers: scratch for headers, the destination in pieces of 4 MiB, scratch again for a short rest',
  async (t) => {
    const length = 9 * 2 ** 20 + 1000
    const { reader, targets } = recording()
    t.equal(reader.next().length, 65_536)
    const stream = rawGradient(0, new Uint8Array(length), { mask: new Uint8Array(4) })
    const start = stream.length - length
    feed(reader, stream.subarray(0, start))
    const reads: number[] = []
    for (let left = length; left > 0; ) {
      const buffer = reader.next()
      const count = Math.min(left, buffer.length)
      reads.push(count)
      t.equal(buffer.buffer === targets[0]!.buffer, left >= 32_768, `${left} bytes to go`)
      reader.read(count)
      left -= count
    }
    t.same(reads, [4 * 2 ** 20, 4 * 2 ** 20, 2 ** 20 + 1000])
  },
)

t.test('while reading is paused the rest of a read waits, and nothing of it is lost', async (t) => {
  const zero = new Uint8Array(4)
  const fragments = Array.from({ length: 3000 }, (_, i) => rawFrame(i === 0 ? 0x02 : 0x00, Buffer.of(i & 255), zero))
  const message = Buffer.concat([...fragments, rawFrame(0x80, Buffer.of(1), zero)])
  const gradient = rawGradient(1, randomBytes(IN_PLACE_BYTES, 1), { mask: zero })
  const { reader, events, small, state } = recording()
  state.mayGoOn = 1000
  feed(reader, message)
  t.equal(small.length, 1000)
  t.equal(Buffer.concat(events.map((event) => ('ordinary' in event ? event.ordinary : Buffer.of()))).length, 7007)
  t.equal(reader.goOn(), true)
  t.equal(small.length, 1000, 'a message that is large waits for the end of the pause')
  state.mayGoOn = Infinity
  t.equal(reader.goOn(), true)
  t.equal(reader.goOn(), false, 'there is nothing left')
  feed(reader, gradient)
  t.equal(small.length, 2999)
  t.same(
    digest(merged(events)),
    digest([{ ordinary: message }, { placed: Buffer.from(randomBytes(IN_PLACE_BYTES, 1)) }]),
  )
})

t.test('gradients in two fragments are never too many small frames, however small they are', async (t) => {
  const { reader, small } = recording()
  for (let bytes = 0; bytes < 3000; bytes++)
    feed(reader, rawGradient(bytes, randomBytes(bytes % 7, 1), { mask: new Uint8Array(4), fragments: true }))
  t.equal(small.length, 0)
})

t.test('a pause that ends while the last bytes are forwarded leaves nothing behind', async (t) => {
  const zero = new Uint8Array(4)
  const fragments = Array.from({ length: 100 }, (_, i) => rawFrame(i === 0 ? 0x02 : 0x00, Buffer.of(i), zero))
  const message = Buffer.concat([...fragments, rawFrame(0x80, Buffer.of(1), zero)])
  const { reader, events, state } = recording()
  state.mayGoOn = 10
  state.onForward = () => {
    state.mayGoOn = Infinity
    t.equal(reader.goOn(), false, 'not in the middle of a read')
  }
  feed(reader, message)
  t.same(digest(merged(events)), digest([{ ordinary: message }]))
})

t.test('a large message is asked for at its beginning, once what is before it was forwarded', async (t) => {
  const zero = new Uint8Array(4)
  const small = rawFrame(0x82, randomBytes(100, 1), zero)
  const large = rawFrame(0x82, randomBytes(100_000, 2), zero)
  const { reader, events, asked, state } = recording()
  state.isFull = true
  feed(reader, Buffer.concat([small, large.subarray(0, 5000)]))
  t.same(events, [{ ordinary: small }])
  t.equal(reader.goOn(), true, 'it is asked for again')
  t.same([events.length, asked], [1, []], 'reading is paused: the answer is known')
  state.isFull = false
  t.equal(reader.goOn(), true)
  feed(reader, large.subarray(5000))
  t.same(digest(merged(events)), digest([{ ordinary: Buffer.concat([small, large]) }]))
  t.same(asked, [large.length])
})

t.test('fragments are asked for with all that their message may have, once they are many', async (t) => {
  const zero = new Uint8Array(4)
  const fragments = (count: number) => [
    rawFrame(0x02, Buffer.of(1), zero),
    ...new Array<Buffer>(count).fill(rawFrame(0x00, Buffer.of(1), zero)),
    rawFrame(0x80, Buffer.of(1), zero),
  ]
  const { reader, asked } = recording()
  feed(reader, Buffer.concat(fragments(50)))
  t.same(asked, [], 'a short one is not asked for')
  feed(reader, Buffer.concat(fragments(70)))
  t.ok(asked.length > 0 && asked.every((bytes) => bytes >= 65_536), 'each counts what a Buffer takes')
  asked.length = 0
  feed(reader, Buffer.concat(fragments(50)))
  t.same(asked, [], 'and the next message begins from nothing')
})

t.test('a destination of another length than the data is a bug that is not survived', async (t) => {
  const reader = new FrameReader({ ...noHooks, destination: () => new Uint8Array(5) })
  const bytes = rawGradient(0, randomBytes(IN_PLACE_BYTES, 1), { mask: new Uint8Array(4) }).subarray(0, UNDECIDED_BYTES)
  t.throws(() => feed(reader, bytes), { code: 'ERR_ASSERTION' })
})

const noHooks = {
  maxPayload: 0,
  unmask: () => undefined,
  forward: () => undefined,
  received: () => undefined,
  skipped: () => undefined,
  small: () => undefined,
  admit: () => true,
  paused: () => false,
}

type Piece = { kind: 'gradient' | 'refused' | 'text' | 'ping' | 'fragments'; mask: Uint8Array; fragments?: boolean }

function encode(piece: Piece, index: number, data: Uint8Array): Buffer {
  const { kind, mask, fragments = false } = piece
  if (kind === 'gradient' || kind === 'refused') return rawGradient(index, data, { mask, fragments })
  if (kind === 'text') return rawFrame(0x81, data, mask)
  const ping = rawFrame(0x89, data.subarray(0, 125), mask)
  return kind === 'ping' ? ping : Buffer.concat([rawFrame(0x02, data, mask), ping, rawFrame(0x80, data, mask)])
}

function recording(refused: ReadonlySet<number> = new Set()) {
  const events: Event[] = []
  const targets: Uint8Array[] = []
  const skipped: number[] = []
  const small: number[] = []
  const asked: number[] = []
  const state = { mayGoOn: Infinity, isFull: false, onForward: () => {} }
  const reader = new FrameReader({
    maxPayload: 0,
    unmask: (bytes, key) => bytes.set(bytes.map((byte, i) => byte ^ key[i & 3]!)),
    forward: (bytes) => {
      events.push({ ordinary: bytes })
      state.onForward()
    },
    destination: ({ parameter, dataLength }) => {
      if (refused.has(parameter)) return undefined
      targets.push(new Uint8Array(dataLength))
      return targets.at(-1)
    },
    received: () => events.push({ placed: Buffer.from(targets.at(-1)!) }),
    skipped: (bytes) => skipped.push(bytes),
    small: () => small.push(1),
    admit: (bytes) => {
      asked.push(bytes)
      return !state.isFull
    },
    paused: () => state.isFull || small.length >= state.mayGoOn,
  })
  return { reader, events, targets, skipped, small, asked, state }
}

function receive(stream: Buffer, splits: readonly number[], refused: ReadonlySet<number>) {
  const { reader, events, skipped } = recording(refused)
  for (let at = 0, turn = 0; at < stream.length; turn++) {
    const count = splits[turn % splits.length]!
    feed(reader, stream.subarray(at, at + count))
    at += count
  }
  return { seen: events, skipped }
}

/** The same events without pings and pongs, and the pings apart. */
function sorted(events: readonly Event[]): { rest: Event[]; pings: Buffer[] } {
  const pings: Buffer[] = []
  const rest = merged(events).map((event) => {
    if ('placed' in event) return event
    const others: Buffer[] = []
    for (let at = 0; at < event.ordinary.length; ) {
      const frame = frameAt(event.ordinary, at)
      ;(frame[0] === 0x89 ? pings : others).push(frame)
      at += frame.length
    }
    return { ordinary: Buffer.concat(others) }
  })
  return { rest: rest.filter((event) => 'placed' in event || event.ordinary.length > 0), pings }
}

/** The masked frame that begins at `at`. */
function frameAt(bytes: Buffer, at: number): Buffer {
  const short = bytes[at + 1]! & 0x7f
  const [form, length] =
    short < 126
      ? [0, short]
      : short === 126
        ? [2, bytes.readUInt16BE(at + 2)]
        : [8, Number(bytes.readBigUInt64BE(at + 2))]
  return bytes.subarray(at, at + 6 + form + length)
}

/** Fills the buffers that it is given, as a socket does. */
function feed(reader: FrameReader, bytes: Uint8Array): void {
  for (let at = 0; at < bytes.length; ) {
    const buffer = reader.next()
    const part = bytes.subarray(at, at + buffer.length)
    buffer.set(part)
    reader.read(part.length)
    at += part.length
  }
}

/** Ordinary bytes may be forwarded in any pieces: joins neighbours. */
function merged(events: readonly Event[]): Event[] {
  const starts = events.flatMap((event, i) => ('placed' in event || i === 0 || 'placed' in events[i - 1]! ? [i] : []))
  return starts.map((start, i) => {
    const pieces = events.slice(start, starts[i + 1])
    return 'placed' in pieces[0]!
      ? pieces[0]
      : { ordinary: Buffer.concat(pieces.flatMap((event) => ('ordinary' in event ? [event.ordinary] : []))) }
  })
}

function digest(events: readonly Event[]): string[] {
  return events.map((event) => {
    const [kind, bytes] = 'placed' in event ? ['placed', event.placed] : ['ordinary', event.ordinary]
    return `${kind} ${createHash('sha1').update(bytes).digest('hex')} ${bytes.length}`
  })
}
