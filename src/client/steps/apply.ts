import { decodeBlocks } from '../../../kernels/blocks.js'
import { type Dtype, isBlockDtype, tensorBytes, type WireDtype } from '../../../kernels/dtype.js'
import { float16Values, numberToBfloat16 } from '../../../kernels/narrow.js'
import { Ranges } from '../../wire/ranges.js'
import { MuondError } from '../error.js'

/** A parameter's values: float32, or bfloat16 as its raw bits. */
export type Weights = Float32Array | Uint16Array

/**
 * One complete update: `scale`, `decay` and the bytes as the service sent them; no `data` means no change but the
 * rows'.
 */
export type Update = {
  scale: number
  decay: number
  dtype: WireDtype
  /** Little-endian, C order, at an address that is a multiple of 4. */
  data?: Uint8Array
  /** One factor for each of equally many consecutive elements of the whole tensor; absent when all are 1. */
  row_scale?: Float32Array
}

/** Elements widened to float32 at a time: the block stays in the first-level cache between the two loops. */
const BLOCK = 4096

/**
 * W <- row_scale ⊙ ((1 - decay) · W + scale · data), in place, with the roundings of docs/protocol.md ("Arithmetic"):
 * every factor, product and sum is rounded to float32, and the result to the weights' own type. The sizes are checked
 * before anything is written. `part`: the weights are those of `ranges`, of a tensor with so many elements.
 * @throws MuondError SHAPE_MISMATCH
 */
export function applyUpdate(
  weights: Weights,
  sent: Update,
  part: { ranges: Ranges; elements: number } = { ranges: Ranges.whole(weights.length), elements: weights.length },
): void {
  const { data, row_scale } = sent
  if (data !== undefined) requireSize('data', data.byteLength, tensorBytes(sent.dtype, weights.length))
  const update = decoded(sent, weights.length)
  if (row_scale === undefined) return applyRows(weights, update, { first: 0, end: weights.length, factor: 1 })
  const width = part.elements / row_scale.length
  if (!Number.isInteger(width)) {
    throw new MuondError('SHAPE_MISMATCH', `row_scale has ${row_scale.length} factors, for ${part.elements} weights`)
  }
  for (const { first, end, row } of rowsOf(part.ranges, width))
    applyRows(weights, update, { first, end, factor: row_scale[row] })
}

/** The pieces of ranges that lie in one row of `width` elements each; `first` and `end` count the ranges' elements. */
function* rowsOf(ranges: Ranges, width: number): Generator<{ first: number; end: number; row: number }> {
  let first = 0
  for (const [start, stop] of ranges.list()) {
    for (let at = start; at < stop; ) {
      const row = Math.floor(at / width)
      const end = first + Math.min(stop, (row + 1) * width) - at
      yield { first, end, row }
      at += end - first
      first = end
    }
  }
}

/** An update with elements of their own. */
type ElementUpdate = Update & { dtype: Dtype }

/** One that travels in blocks is decoded. */
function decoded(update: Update, elements: number): ElementUpdate {
  const { dtype, data } = update
  if (!isBlockDtype(dtype)) return { ...update, dtype }
  if (data === undefined) return { ...update, dtype: 'float32' }
  const values = new Float32Array(elements)
  decodeBlocks(data, dtype, values)
  return { ...update, dtype: 'float32', data: new Uint8Array(values.buffer) }
}

function requireSize(name: string, size: number, expected: number): void {
  if (size !== expected) throw new MuondError('SHAPE_MISMATCH', `${name} has ${size} bytes, expected ${expected}`)
}

/** Elements `first` to `end`, all with the same row scale. */
type Rows = { first: number; end: number; factor: number }

/** Each of them a float32. */
type Factors = { keep: number; scale: number; factor: number }

function applyRows(weights: Weights, update: ElementUpdate, rows: Rows): void {
  const factors = { keep: Math.fround(1 - update.decay), scale: Math.fround(update.scale), factor: rows.factor }
  for (let first = rows.first; first < rows.end; first += BLOCK) {
    const range = { first, end: Math.min(first + BLOCK, rows.end) }
    const values = update.data && elements(update.data, update.dtype, range)
    const block = weights.subarray(range.first, range.end)
    if (block instanceof Float32Array) blend(block, values, factors)
    else blendBfloat16(block, values, factors)
  }
}

const { fround } = Math

/**
 * Math.fround of a product or a sum of two float32 numbers, which JavaScript computes in float64, is that operation
 * rounded once to float32: the product is exact in float64, and a sum rounded to 53 bits and then to 24 is the sum
 * rounded to 24 (S. A. Figueroa, "When is double rounding innocuous?", 1995: from 2 · 24 + 2 bits on). Storing in a
 * Float32Array rounds alike. Without values nothing is added, since -0 + 0 is 0; a product with 1 changes no bit.
 */
function blend(weights: Float32Array, values: Float32Array | undefined, { keep, scale, factor }: Factors): void {
  if (values === undefined) {
    for (let i = 0; i < weights.length; i++) weights[i] = factor * fround(keep * weights[i])
    return
  }
  for (let i = 0; i < weights.length; i++) {
    weights[i] = factor * fround(fround(keep * weights[i]) + fround(scale * values[i]))
  }
}

const wide = scratch()

function blendBfloat16(weights: Uint16Array, values: Float32Array | undefined, factors: Factors): void {
  const { length } = weights
  for (let i = 0; i < length; i++) wide.bits[i] = weights[i] << 16
  blend(wide.floats.subarray(0, length), values, factors)
  for (let i = 0; i < length; i++) weights[i] = numberToBfloat16(wide.floats[i])
}

const widened = scratch()

/** The elements `first` to `end` of `data` as float32; the answer is good until the next call. */
function elements(data: Uint8Array, dtype: Dtype, { first, end }: { first: number; end: number }): Float32Array {
  if (dtype === 'float32') return new Float32Array(data.buffer, data.byteOffset + 4 * first, end - first)
  const patterns = new Uint16Array(data.buffer, data.byteOffset + 2 * first, end - first)
  if (dtype === 'bfloat16') {
    for (let i = 0; i < patterns.length; i++) widened.bits[i] = patterns[i] << 16
    return widened.floats
  }
  const values = float16Values()
  for (let i = 0; i < patterns.length; i++) widened.floats[i] = values[patterns[i]]
  return widened.floats
}

/** Room for a block of float32 numbers, and for their bits. */
function scratch() {
  const floats = new Float32Array(BLOCK)
  return { floats, bits: new Uint32Array(floats.buffer) }
}
