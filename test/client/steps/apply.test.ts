import { readFileSync } from 'node:fs'
import fc from 'fast-check'
import t from 'tap'
import type { BlockDtype, Dtype } from '../../../kernels/dtype.js'
import { bfloat16ToNumber, float16Values, numberToBfloat16 } from '../../../kernels/narrow.js'
import { applyUpdate, type Update, type Weights } from '../../../src/client/steps/apply.js'

const { fround } = Math
const bytesOf = (hex: string) => Uint8Array.from(Buffer.from(hex, 'hex'))

/** The formula, one element at a time, from the bytes. */
function expected(weights: Weights, update: Update & { dtype: Dtype }): number[] {
  const { scale, decay, dtype, data, row_scale } = update
  return Array.from(weights, (stored, i) => {
    const weight = weights instanceof Float32Array ? stored : bfloat16ToNumber(stored)
    const kept = fround(fround(1 - decay) * weight)
    const sum = data === undefined ? kept : fround(kept + fround(fround(scale) * elementOf(data, dtype, i)))
    const row = row_scale === undefined ? 1 : row_scale[Math.floor((i * row_scale.length) / weights.length)]
    const value = fround(row * sum)
    return weights instanceof Float32Array ? value : numberToBfloat16(value)
  })
}

function elementOf(data: Uint8Array, dtype: Dtype, i: number): number {
  const view = new DataView(data.buffer, data.byteOffset)
  if (dtype === 'float32') return view.getFloat32(4 * i, true)
  const pattern = view.getUint16(2 * i, true)
  return dtype === 'bfloat16' ? bfloat16ToNumber(pattern) : float16Values()[pattern]
}

const BYTES = { float32: 4, bfloat16: 2, float16: 2 } as const
/** Upper byte of an element in the range of ordinary numbers: the formula is not about NaN. */
const ORDINARY = { float32: [0x3d, 0xbe], bfloat16: [0x3d, 0xbe], float16: [0x2c, 0xb1] } as const

function randomData(dtype: Dtype, elements: number, next: () => number): Uint8Array {
  const width = BYTES[dtype]
  return Uint8Array.from({ length: elements * width }, (_, i) =>
    i % width === width - 1 ? ORDINARY[dtype][next() & 1] : next(),
  )
}

/** Bytes of a small linear congruential generator (Numerical Recipes). */
function bytesFrom(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state >>> 24
  }
}

t.test(
  'an update is W <- row_scale ⊙ ((1 - decay) W + scale data), rounded one by one, for every pair of types',
  (t) => {
    const update = fc.record({
      rows: fc.integer({ min: 1, max: 7 }),
      width: fc.oneof(fc.integer({ min: 1, max: 40 }), fc.constant(4096), fc.constant(4500)),
      scale: fc.double({ min: -1, max: 1, noNaN: true }),
      decay: fc.double({ min: 0, max: 0.5, noNaN: true }),
      dtype: fc.constantFrom<Dtype>('float32', 'bfloat16', 'float16'),
      wide: fc.boolean(),
      hasData: fc.boolean(),
      hasRows: fc.boolean(),
      seed: fc.nat(),
    })
    fc.assert(
      fc.property(update, ({ rows, width, scale, decay, dtype, wide, hasData, hasRows, seed }) => {
        const next = bytesFrom(seed)
        const numbers = Array.from({ length: rows * width }, () => next() / 128 - 1)
        const weights = wide ? Float32Array.from(numbers) : Uint16Array.from(numbers, numberToBfloat16)
        const data = hasData ? randomData(dtype, rows * width, next) : undefined
        const row_scale = hasRows ? Float32Array.from({ length: rows }, () => next() / 256) : undefined
        const change = { scale, decay, dtype, data, row_scale }
        const want = expected(weights, change)
        applyUpdate(weights, change)
        return want.every((value, i) => value === weights[i])
      }),
      { seed: 5, numRuns: 200 },
    )
    t.end()
  },
)

t.test('an update without data scales the rows and nothing else', (t) => {
  const weights = Float32Array.of(1, 2, 3, 4)
  applyUpdate(weights, { scale: 0, decay: 0, dtype: 'float32', row_scale: Float32Array.of(1, 0.5) })
  t.same([...weights], [1, 2, 1.5, 2])
  t.end()
})

t.test('an update in blocks is applied as the float32 that it decodes to', (t) => {
  const blocks: { dtype: BlockDtype; bytes: string; decoded: string }[] = JSON.parse(
    readFileSync('test/golden/blocks.json', 'utf8'),
  )
  for (const { dtype, bytes, decoded } of blocks) {
    const data = bytesOf(decoded)
    const [found, wanted] = [new Float32Array(data.length / 4).fill(0.5), new Float32Array(data.length / 4).fill(0.5)]
    applyUpdate(found, { scale: -0.1, decay: 0.01, dtype, data: bytesOf(bytes) })
    applyUpdate(wanted, { scale: -0.1, decay: 0.01, dtype: 'float32', data })
    t.same(found, wanted)
    const rows = Float32Array.of(0.5)
    applyUpdate(found, { scale: 0, decay: 0, dtype, row_scale: rows })
    applyUpdate(wanted, { scale: 0, decay: 0, dtype: 'float32', row_scale: rows })
    t.same(found, wanted)
  }
  t.end()
})

t.test('sizes that do not fit change nothing', (t) => {
  const table: [title: string, update: Partial<Update>, message: RegExp][] = [
    ['too few bytes', { data: new Uint8Array(8) }, /data has 8 bytes, expected 12/],
    ['bytes of another dtype', { dtype: 'float16', data: new Uint8Array(12) }, /data has 12 bytes, expected 6/],
    ['bytes of no whole block', { dtype: 'int8_block256', data: new Uint8Array(4) }, /data has 4 bytes, expected 5/],
    ['rows that do not divide', { row_scale: new Float32Array(2) }, /row_scale has 2 factors, for 3 weights/],
  ]
  for (const [title, update, message] of table) {
    const weights = Float32Array.of(1, 2, 3)
    const apply = () => applyUpdate(weights, { scale: 1, decay: 0, dtype: 'float32', ...update })
    t.throws(apply, { code: 'SHAPE_MISMATCH', message }, title)
    t.same([...weights], [1, 2, 3], title)
  }
  t.end()
})

type Golden = Record<'title' | 'weights_dtype' | 'weights' | 'expected', string> &
  Record<'data' | 'row_scale', string | null> & { update_dtype: Dtype; scale: number; decay: number }

/** test/golden/README.md says how the cases are made. The Python client's tests read them too. */
const GOLDEN: Golden[] = JSON.parse(readFileSync('test/golden/apply.json', 'utf8'))

t.test('the bits are those that every client has', (t) => {
  const ours = GOLDEN.filter(({ weights_dtype }) => weights_dtype === 'float32' || weights_dtype === 'bfloat16')
  t.equal(ours.length, 30)
  for (const { title, weights_dtype, weights, expected, data, row_scale, update_dtype: dtype, ...factors } of ours) {
    const { buffer } = bytesOf(weights)
    applyUpdate(weights_dtype === 'float32' ? new Float32Array(buffer) : new Uint16Array(buffer), {
      ...{ ...factors, dtype },
      ...(data !== null && { data: bytesOf(data) }),
      ...(row_scale !== null && { row_scale: new Float32Array(bytesOf(row_scale).buffer) }),
    })
    t.equal(Buffer.from(buffer).toString('hex'), expected, title)
  }
  t.end()
})
