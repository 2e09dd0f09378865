import t from 'tap'
import { IN_PLACE_BYTES, recognize, UNDECIDED_BYTES } from '../../../src/link/websocket/gradient-frame.js'
import { encodeHeader, encodeWithData } from '../../../src/wire/codec.js'
import { randomBytes, rawFrame, rawGradient } from './raw-frame.js'

const mask = Uint8Array.from([0x12, 0x34, 0x56, 0x78])
const zero = new Uint8Array(4)
const data = randomBytes(IN_PLACE_BYTES + 3, 1)
const header = encodeHeader({ type: 'gradient', parameter: 3, step: 1, offset: 0 }, data.length)
const head = { parameter: 3, step: 1, offset: 0, dataStart: header.length, dataLength: data.length }

t.test('a gradient is recognized as one frame or two, and its key begins where its data begins', async (t) => {
  for (const key of [mask, zero]) {
    for (const fragments of [true, false]) {
      const message = rawGradient(3, data, { mask: key, fragments })
      const found = recognize(message.subarray(0, UNDECIDED_BYTES), false, 0)
      if (found.kind !== 'gradient') throw new Error(`recognized as ${found.kind}`)
      t.same(found.head, head)
      t.equal(found.end, message.length)
      const bytes = message.subarray(found.start, found.end).map((byte, i) => byte ^ found.key[i & 3]!)
      t.ok(Buffer.from(data).equals(bytes), `mask ${key}, ${fragments ? 'two fragments' : 'one frame'}`)
    }
  }
})

t.test('what is not enough to decide is never decided, and UNDECIDED_BYTES always are', async (t) => {
  for (const fragments of [true, false]) {
    const message = rawGradient(3, data, { mask, fragments })
    const whole = recognize(message, false, 0)
    const needed = whole.kind === 'gradient' ? whole.start : 0
    for (let length = 0; length < needed; length++) {
      t.equal(recognize(message.subarray(0, length), false, 0).kind, 'more', `${length} bytes`)
    }
    t.same(recognize(message.subarray(0, needed), false, 0), whole)
  }
  const endless = rawFrame(
    0x82,
    Buffer.concat([header.subarray(0, 6), Buffer.from([0xdb, 0xff, 0xff, 0xff, 0xff]), data]),
    mask,
  )
  t.equal(recognize(endless.subarray(0, UNDECIDED_BYTES), false, 0).kind, 'ordinary')
})

t.test('everything else is an ordinary frame', async (t) => {
  const whole = Buffer.concat([header, data])
  const tooShort = data.subarray(0, IN_PLACE_BYTES - 100)
  const huge = Buffer.from([0x82, 0xff, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])
  const twoFragments = (second: Buffer, first = header) => Buffer.concat([rawFrame(0x02, first, mask), second])
  const cases: [string, Buffer, { fragmented?: boolean; maxPayload?: number; goesOn?: boolean; length?: number }][] = [
    ['text', rawFrame(0x81, whole, mask), {}],
    ['a ping without a mask', rawFrame(0x89, Buffer.from('hello')), {}],
    ['a ping in fragments', rawFrame(0x09, Buffer.from('hello'), mask), {}],
    [
      'a ping that is too long, between fragments',
      rawFrame(0x89, data.subarray(0, 126), mask),
      { fragmented: true, goesOn: true },
    ],
    ['a close', rawFrame(0x88, Buffer.from('hello'), mask), {}],
    ['the last fragment', rawFrame(0x80, whole, mask), { fragmented: true }],
    ['a middle fragment', rawFrame(0x00, whole, mask), { fragmented: true, goesOn: true }],
    ['a message inside a fragmented one', rawFrame(0x82, whole, mask), { fragmented: true }],
    ['an unmasked gradient', rawFrame(0x82, whole), {}],
    ['a reserved bit', rawFrame(0xc2, whole, mask), {}],
    ['a small gradient', rawGradient(3, tooShort, { mask }), {}],
    ['200 bytes', rawFrame(0x82, data.subarray(0, 200), mask), {}],
    ['more than maxPayload', rawFrame(0x82, whole, mask), { maxPayload: whole.length - 1 }],
    ['another message', rawFrame(0x82, data, mask), {}],
    ['an update', rawFrame(0x82, encodeWithData({ type: 'update', parameter: 3, step: 1, offset: 0 }, data), mask), {}],
    ['data that does not end the message', rawFrame(0x82, Buffer.concat([whole, zero]), mask), {}],
    ['data longer than the message', rawFrame(0x82, whole.subarray(1), mask), {}],
    ['2^32 bytes of something else', Buffer.concat([huge, data]), { length: 14 + 2 ** 32 }],
    ['a long first fragment', rawFrame(0x02, whole, mask), { goesOn: true }],
    ['a first fragment that is no header', rawFrame(0x02, data.subarray(0, 50), mask), { goesOn: true }],
    ['half a header', rawFrame(0x02, header.subarray(0, 9), mask), { goesOn: true }],
    ['a first fragment with data', rawFrame(0x02, whole.subarray(0, header.length + 1), mask), { goesOn: true }],
    ['a small gradient in two', rawGradient(3, tooShort, { mask, fragments: true }), { goesOn: true }],
    [
      'two fragments beyond maxPayload',
      rawGradient(3, data, { mask, fragments: true }),
      { maxPayload: whole.length - 1, goesOn: true },
    ],
    ['a header, then a ping', twoFragments(rawFrame(0x89, zero, mask)), { goesOn: true }],
    ['a header, then two fragments', twoFragments(rawFrame(0x00, data, mask)), { goesOn: true }],
    ['a header, then unmasked data', twoFragments(rawFrame(0x80, data)), { goesOn: true }],
    ['a header, then other data', twoFragments(rawFrame(0x80, whole, mask)), { goesOn: true }],
  ]
  for (const [name, bytes, { fragmented = false, maxPayload = 0, goesOn = false, length }] of cases) {
    const found = recognize(bytes.subarray(0, UNDECIDED_BYTES), fragmented, maxPayload)
    t.match(found, { kind: 'ordinary', fragmented: goesOn }, name)
    if (length !== undefined) t.match(found, { length }, name)
  }
})

t.test('a small fragment counts as one between the first and the last of its message', async (t) => {
  const isSmall = (first: number, bytes: number, fragmented: boolean) => {
    const found = recognize(rawFrame(first, data.subarray(0, bytes), mask), fragmented, 0)
    return found.kind === 'ordinary' ? found.isSmall : undefined
  }
  t.equal(isSmall(0x00, 1023, true), true, 'in the middle')
  t.equal(isSmall(0x00, 1024, true), false, 'large')
  t.equal(isSmall(0x02, 10, false), false, 'the first')
  t.equal(isSmall(0x80, 10, true), false, 'the last')
  t.equal(isSmall(0x82, 10, false), false, 'a whole message')
})

t.test('a ping or a pong is recognized once it is whole, between fragments, too', async (t) => {
  for (const [first, isPing] of [
    [0x89, true],
    [0x8a, false],
  ] as const) {
    for (const size of [0, 5, 125]) {
      const bytes = rawFrame(first, data.subarray(0, size), mask)
      const { length } = bytes
      for (const fragmented of [true, false]) {
        t.same(recognize(Buffer.concat([bytes, data]), fragmented, 0), { kind: 'control', isPing, length })
        t.same(recognize(bytes.subarray(0, -1), fragmented, 0), { kind: 'more' })
      }
    }
  }
})

t.test('maxPayload is met by a message of just that length', async (t) => {
  const length = header.length + data.length
  for (const fragments of [true, false]) {
    t.equal(recognize(rawGradient(3, data, { mask, fragments }), false, length).kind, 'gradient')
  }
})
