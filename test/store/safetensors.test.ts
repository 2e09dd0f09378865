import fc from 'fast-check'
import t from 'tap'
import {
  encodeHeader,
  encodingHeader,
  parseSafetensors,
  SAFETENSORS_DTYPES,
  type SafetensorsDtype,
  SafetensorsError,
} from '../../src/store/safetensors.js'

const DTYPES = Object.keys(SAFETENSORS_DTYPES) as SafetensorsDtype[]

function file(header: unknown, body = new Uint8Array()): Uint8Array {
  return raw(Buffer.from(typeof header === 'string' ? header : JSON.stringify(header)), body)
}

function raw(header: Uint8Array, body = new Uint8Array()): Uint8Array {
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(header.length))
  return Buffer.concat([length, header, body])
}

t.test('a written file holds the header bytes of the format', async (t) => {
  const header = Buffer.from(encodeHeader([{ name: 'a', dtype: 'F32', shape: [1, 2], bytes: 8 }], { step: '3' }))
  const json = '{"__metadata__":{"step":"3"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
  t.equal(header.readBigUInt64LE(), 88n)
  t.equal(header.toString('latin1', 8), json.padEnd(88, ' '))
})

t.test('a long header is written in slices, and is the same', (t) => {
  const entries = Array.from({ length: 1100 }, (_, i) => {
    return { name: `ü${i}`, dtype: 'F32', shape: [2], bytes: 8 } as const
  })
  const metadatas: Record<string, string>[] = [{}, { step: '3' }]
  for (const metadata of metadatas) {
    const encoding = encodingHeader(entries, metadata)
    let slices = 1
    let last = encoding.next()
    for (; !last.done; last = encoding.next()) slices += 1
    t.equal(slices, 3)
    const described = entries.map(({ name, dtype, shape }, i) => {
      return [name, { dtype, shape, data_offsets: [8 * i, 8 * i + 8] }]
    })
    const all = { ...('step' in metadata && { __metadata__: metadata }), ...Object.fromEntries(described) }
    const json = Buffer.from(JSON.stringify(all))
    const header = Buffer.from(last.value ?? [])
    t.ok(header.subarray(8, 8 + json.length).equals(json))
    t.equal(header.length % 8, 0)
    t.equal(header.toString('latin1', 8 + json.length).trim(), '')
    t.equal(header.readBigUInt64LE(), BigInt(header.length - 8))
    t.ok(header.equals(encodeHeader(entries, metadata)))
  }
  t.end()
})

t.test('what was written is parsed, at any offset of its buffer', async (t) => {
  const tensor = fc.record({
    name: fc.oneof(fc.string({ unit: 'grapheme' }), fc.constantFrom('__proto__', 'constructor', '1')),
    dtype: fc.constantFrom(...DTYPES),
    shape: fc.array(fc.integer({ min: 0, max: 4 }), { maxLength: 4 }),
  })
  const tensors = fc.uniqueArray(tensor, { selector: ({ name }) => name, maxLength: 6 })
  fc.assert(
    fc.property(tensors, fc.dictionary(fc.string(), fc.string(), { noNullPrototype: true }), (tensors, metadata) => {
      const entries = tensors
        .filter(({ name }) => name !== '__metadata__')
        .map((entry) => ({ ...entry, bytes: entry.shape.reduce((a, b) => a * b, SAFETENSORS_DTYPES[entry.dtype]) }))
      const header = encodeHeader(entries, metadata)
      t.equal(header.length % 8, 0)
      const datas = entries.map(({ bytes }, index) => new Uint8Array(bytes).fill(index + 1))
      const parsed = parseSafetensors(Buffer.concat([Buffer.from('xyz'), header, ...datas]).subarray(3))
      t.same(parsed.metadata, metadata)
      t.equal(parsed.tensors.size, entries.length)
      for (const [index, { name, dtype, shape }] of entries.entries()) {
        t.same(parsed.tensors.get(name), { dtype, shape, data: Buffer.from(datas[index]) })
      }
    }),
    { numRuns: 200, seed: 6 },
  )
})

t.test('a file without tensors or metadata is legal', async (t) => {
  t.same(parseSafetensors(encodeHeader([])), { metadata: {}, tensors: new Map() })
})

const A = { dtype: 'F32', shape: [2], data_offsets: [0, 8] }
const MALFORMED: [string, Uint8Array, RegExp][] = [
  ['nothing', new Uint8Array(), /has 0 bytes, expected at least 8/],
  ['half a length', new Uint8Array(7), /has 7 bytes/],
  [
    'a header longer than the file',
    Buffer.concat([Buffer.from([3, 0, 0, 0, 0, 0, 0, 0]), Buffer.from('{}')]),
    /claims 3 bytes, at most 2/,
  ],
  ['a length of 2^64 - 1', new Uint8Array(16).fill(255), /claims 18446744073709552000 bytes, at most 8/],
  ['an empty header', file(''), /header is not JSON/],
  ['a cut header', file('{"a":'), /header is not JSON/],
  ['a header that is not UTF-8', raw(Uint8Array.of(0x7b, 0xff, 0x7d)), /header is not JSON/],
  ['a list as header', file([]), /header is not a JSON object/],
  ['null as header', file('null'), /header is not a JSON object/],
  ['metadata that is no object', file({ __metadata__: 'x' }), /__metadata__ is not an object/],
  ['metadata with a number', file({ __metadata__: { step: 3 } }), /__metadata__ 'step' is 3, expected a string/],
  ['a tensor that is no object', file({ a: 1 }), /tensor 'a' is not an object/],
  [
    'an unknown dtype',
    file({ a: { ...A, dtype: 'F8' } }),
    /tensor 'a' has dtype "F8", expected one of F32, BF16, F16, I64/,
  ],
  ['an inherited property as dtype', file({ a: { ...A, dtype: 'toString' } }), /has dtype "toString"/],
  ['no dtype', file({ a: { shape: [2], data_offsets: [0, 8] } }), /has dtype undefined/],
  ['no shape', file({ a: { dtype: 'F32', data_offsets: [0, 8] } }), /has shape undefined/],
  ['a negative size', file({ a: { ...A, shape: [-2] } }), /has shape \[-2\]/],
  ['half a size', file({ a: { ...A, shape: [0.5] } }), /has shape \[0.5\]/],
  ['an unsafe size', file({ a: { ...A, shape: [2 ** 60] } }), /has shape/],
  ['no offsets', file({ a: { dtype: 'F32', shape: [2] } }), /has data_offsets undefined, expected two/],
  ['one offset', file({ a: { ...A, data_offsets: [8] } }), /has data_offsets \[8\], expected two/],
  ['an offset that is text', file({ a: { ...A, data_offsets: ['0', 8] } }), /expected two offsets/],
  [
    'offsets that run backwards',
    file({ a: { ...A, data_offsets: [8, 0] } }, new Uint8Array(8)),
    /has -8 bytes, F32 of shape \[2\] has 8/,
  ],
  [
    'a size that does not fit the shape',
    file({ a: { ...A, data_offsets: [0, 4] } }, new Uint8Array(4)),
    /has 4 bytes, .* has 8/,
  ],
  ['a shape whose product overflows', file({ a: { ...A, shape: [2 ** 50, 2 ** 50] } }), /has 8 bytes/],
  ['data that is cut', file({ a: A }, new Uint8Array(7)), /tensors end at byte 8, the data has 7 bytes/],
  ['data behind the last tensor', file({ a: A }, new Uint8Array(9)), /tensors end at byte 8, the data has 9 bytes/],
  ['a hole', file({ a: A, b: { ...A, data_offsets: [9, 17] } }, new Uint8Array(17)), /begins at byte 9, expected 8/],
  [
    'an overlap',
    file({ a: A, b: { ...A, data_offsets: [4, 12] } }, new Uint8Array(12)),
    /begins at byte 4, expected 8/,
  ],
  ['two tensors on the same bytes', file({ a: A, b: A }, new Uint8Array(8)), /begins at byte 0, expected 8/],
]

for (const [name, bytes, message] of MALFORMED) {
  t.test(`refused: ${name}`, async (t) => {
    t.throws(() => parseSafetensors(bytes), { name: 'SafetensorsError', message })
  })
}

t.test('no bytes make the parser throw anything else', async (t) => {
  const mutated = fc.tuple(fc.nat({ max: 90 }), fc.nat({ max: 255 })).map(([index, value]) => {
    const bytes = Buffer.concat([encodeHeader([{ name: 'a', dtype: 'F32', shape: [2], bytes: 8 }]), new Uint8Array(8)])
    bytes[index % bytes.length] = value
    return bytes
  })
  fc.assert(
    fc.property(fc.oneof(fc.uint8Array({ maxLength: 64 }), mutated), (bytes) => {
      try {
        parseSafetensors(bytes)
      } catch (error) {
        t.ok(error instanceof SafetensorsError, String(error))
      }
    }),
    { numRuns: 1000, seed: 7 },
  )
})

t.test('a header that does not fit its tensors is not written', async (t) => {
  const a = { name: 'a', dtype: 'F32', shape: [2], bytes: 8 } as const
  t.throws(() => encodeHeader([a, a]), { message: "tensor name 'a' is reserved or appears twice" })
  t.throws(() => encodeHeader([{ ...a, name: '__metadata__' }]), { message: /'__metadata__' is reserved/ })
  t.throws(() => encodeHeader([{ ...a, bytes: 4 }]), { message: "tensor 'a' has 4 bytes, F32 of shape [2] has 8" })
})
