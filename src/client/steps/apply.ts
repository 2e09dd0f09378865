import { bytesPerElement, type Dtype } from '../../../kernels/dtype.js'
import { bfloat16ToNumber, float16Values, numberToBfloat16 } from '../../../kernels/narrow.js'
import { MuondError } from '../error.js'

/** A parameter's values: float32, or bfloat16 as its raw bits. */
export type Weights = Float32Array | Uint16Array

/** One complete update: `scale`, `decay` and the bytes as the service sent them; no `data` means no change but the rows'. */
export type Update = {
  scale: number
  decay: number
  dtype: Dtype
  /** Little-endian, C order, at an address that is a multiple of 4. */
  data?: Uint8Array
  /** One factor for each of equally many consecutive elements; absent when all are 1. */
  row_scale?: Float32Array
}

/** Elements widened to float32 at a time: the block stays in the first-level cache between the two loops. */
const BLOCK = 4096

/**
 * W <- row_scale ⊙ ((1 - decay) · W + scale · data), in place. Each element is computed in float64 and rounded once, to the
 * nearest value of the weights' own type, ties to even. The sizes are checked before
 * anything is written.
 * @throws MuondError SHAPE_MISMATCH
 */
export function applyUpdate(weights: Weights, update: Update): void {
  const { data, row_scale } = update
  if (data !== undefined) requireSize('data', data.byteLength, weights.length * bytesPerElement(update.dtype))
  if (row_scale === undefined) return applyRows(weights, update, { first: 0, end: weights.length, factor: 1 })
  const width = weights.length / row_scale.length
  if (!Number.isInteger(width)) {
    throw new MuondError('SHAPE_MISMATCH', `row_scale has ${row_scale.length} factors, for ${weights.length} weights`)
  }
  row_scale.forEach((factor, row) => {
    applyRows(weights, update, { first: row * width, end: (row + 1) * width, factor })
  })
}

function requireSize(name: string, size: number, expected: number): void {
  if (size !== expected) throw new MuondError('SHAPE_MISMATCH', `${name} has ${size} bytes, expected ${expected}`)
}

/** Elements `first` to `end`, all with the same row scale. */
type Rows = { first: number; end: number; factor: number }

function applyRows(weights: Weights, update: Update, rows: Rows): void {
  for (let first = rows.first; first < rows.end; first += BLOCK) {
    const end = Math.min(first + BLOCK, rows.end)
    const values = update.data === undefined ? ZEROS : widen(update.data, update.dtype, { first, end })
    const blend = weights instanceof Float32Array ? blendFloat32 : blendBfloat16
    blend(weights.subarray(first, end), values, { keep: 1 - update.decay, scale: update.scale, factor: rows.factor })
  }
}

type Factors = { keep: number; scale: number; factor: number }

function blendFloat32(weights: Weights, values: Float32Array, { keep, scale, factor }: Factors): void {
  for (let i = 0; i < weights.length; i++) weights[i] = factor * (keep * weights[i] + scale * values[i])
}

function blendBfloat16(weights: Weights, values: Float32Array, { keep, scale, factor }: Factors): void {
  for (let i = 0; i < weights.length; i++) {
    weights[i] = numberToBfloat16(factor * (keep * bfloat16ToNumber(weights[i]) + scale * values[i]))
  }
}

const ZEROS = new Float32Array(BLOCK)
const scratch = new Float32Array(BLOCK)
const scratchBits = new Uint32Array(scratch.buffer)

/** The elements `first` to `end` of `data` as float32; the answer is good until the next call. */
function widen(data: Uint8Array, dtype: Dtype, { first, end }: { first: number; end: number }): Float32Array {
  if (dtype === 'float32') return new Float32Array(data.buffer, data.byteOffset + 4 * first, end - first)
  const patterns = new Uint16Array(data.buffer, data.byteOffset + 2 * first, end - first)
  if (dtype === 'bfloat16') {
    for (let i = 0; i < patterns.length; i++) scratchBits[i] = patterns[i] << 16
    return scratch
  }
  const values = float16Values()
  for (let i = 0; i < patterns.length; i++) scratch[i] = values[patterns[i]]
  return scratch
}
