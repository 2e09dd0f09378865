import { readFileSync } from 'node:fs'
import fc from 'fast-check'
import t from 'tap'
import { blocksOf, decodeBlocks, encodeBlocks } from '../../kernels/blocks.js'
import { BLOCK_DTYPES, type BlockDtype, isBlockDtype, tensorBytes } from '../../kernels/dtype.js'

const NAMES = Object.keys(BLOCK_DTYPES).filter(isBlockDtype)
const float32Of = (hex: string) => new Float32Array(new Uint8Array(Buffer.from(hex, 'hex')).buffer)
const hexOf = (values: Float32Array) => Buffer.from(values.buffer).toString('hex')

function decoded(bytes: Uint8Array, dtype: BlockDtype, elements: number): Float32Array {
  const values = new Float32Array(elements)
  decodeBlocks(bytes, dtype, values)
  return values
}

type Golden = { title: string; dtype: BlockDtype; values: string; bytes: string; decoded: string }
const golden: Golden[] = JSON.parse(readFileSync('test/golden/blocks.json', 'utf8'))
for (const { title, dtype, values: given, bytes, decoded: expected } of golden) {
  t.test(`${title}: the bytes are those that every program encodes, and decodes`, async (t) => {
    const values = float32Of(given)
    t.equal(Buffer.from(blocksOf(values, dtype)).toString('hex'), bytes)
    const found = decoded(Buffer.from(bytes, 'hex'), dtype, values.length)
    // A NaN has many patterns of bits.
    if (found.some(Number.isNaN)) t.same(found, float32Of(expected))
    else t.equal(hexOf(found), expected)
  })
}

const anyTensor = fc.record({
  dtype: fc.constantFrom(...NAMES),
  values: fc.float32Array({ minLength: 1, maxLength: 600, noNaN: true, noDefaultInfinity: true }),
})

t.test(
  'an element is half a scale away from what it was at most, and a tensor in blocks is encoded to itself',
  async () => {
    const property = fc.property(anyTensor, ({ dtype, values }) => {
      const { elements, most } = BLOCK_DTYPES[dtype]
      const bytes = blocksOf(values, dtype)
      const found = decoded(bytes, dtype, values.length)
      for (let first = 0; first < values.length; first += elements) {
        const largest = values
          .subarray(first, first + elements)
          .reduce((most, value) => Math.max(most, Math.abs(value)), 0)
        // A bfloat16 has 8 digits, and none is smaller than 2^-133.
        const scale = Math.max((largest / most) * (1 + 2 ** -8), 2 ** -133)
        for (let i = first; i < Math.min(first + elements, values.length); i++)
          if (!(Math.abs(found[i]! - values[i]!) <= Math.max(0.5 * scale * (1 + 2 ** -20), most * 2 ** -134)))
            return false
      }
      return true
    })
    fc.assert(property, { seed: 18, numRuns: 300 })
  },
)

t.test('the sum of squares is that of the decoded elements', async (t) => {
  const values = Float32Array.from({ length: 1000 }, (_, i) => Math.sin(i) * 10 ** ((i % 7) - 3))
  for (const dtype of NAMES) {
    const bytes = new Uint8Array(tensorBytes(dtype, values.length))
    const squares = encodeBlocks(values, dtype, bytes)
    const expected = decoded(bytes, dtype, values.length).reduce((sum, value) => sum + value ** 2, 0)
    t.ok(Math.abs(squares / expected - 1) < 1e-12, `${squares} for ${expected}`)
  }
})

t.test(
  'every pattern of bytes is a tensor: integers below the least one that is encoded, and scales with a sign',
  async (t) => {
    // -128 · 0.5, -1 · 0.5; then -8 · -2, 7 · -2
    t.same(decoded(Uint8Array.of(0x00, 0x3f, 0x80, 0xff), 'int8_block256', 2), [-64, -0.5])
    t.same(decoded(Uint8Array.of(0x00, 0xc0, 0x78), 'int4_block64', 2), [16, -14])
  },
)

t.test('a tensor has a scale for each block, and the last block as many integers as elements are left', async (t) => {
  t.same(
    [1, 255, 256, 257, 600].map((elements) => tensorBytes('int8_block256', elements)),
    [3, 257, 258, 261, 606],
  )
  t.same(
    [1, 2, 63, 64, 65, 200].map((elements) => tensorBytes('int4_block64', elements)),
    [3, 3, 34, 34, 37, 108],
  )
})

t.test('the table of docs/protocol.md has the bytes and the numbers that it says', async (t) => {
  const [, table] =
    readFileSync('docs/protocol.md', 'utf8').match(
      /\n### Tensors in blocks\n[\s\S]*?\n\| --- [^\n]*\n([\s\S]*?)\n\n/,
    ) ?? []
  const rows = table!.split('\n').map((row) => row.split('|').map((cell) => cell.trim()))
  t.same(
    rows.map(([, , dtype]) => dtype),
    NAMES.map((name) => `\`${name}\``),
  )
  for (const [, elements, dtype, bytes, numbers] of rows) {
    const name = dtype!.replaceAll('`', '')
    if (!isBlockDtype(name)) throw new Error(name)
    const [, hex] = elements!.match(/`([^`]*)`/)!
    const values = float32Of(hex!.replaceAll(' ', ''))
    const expected = Buffer.from(bytes!.replaceAll(/[ `]/g, ''), 'hex')
    t.same(Buffer.from(blocksOf(values, name)), expected)
    t.same([...decoded(expected, name, values.length)], numbers!.split(', ').map(Number))
  }
})
