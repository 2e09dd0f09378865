import { decodeBlocks } from '../../kernels/blocks.js'
import { isBlockDtype, type WireDtype } from '../../kernels/dtype.js'
import { bfloat16ToNumber, float16Values } from '../../kernels/narrow.js'

/** The sum of the products of two tensors' elements, in float64 and in C order; of one with itself that of squares. */
export function dot(one: Float32Array, other: Float32Array): number {
  let sum = 0
  for (let i = 0; i < one.length; i++) sum += one[i] * other[i]
  return sum
}

/** The elements of a tensor as it travels; a view where it is float32. Its bytes are aligned for its elements. */
export function numbersOf(bytes: Uint8Array, dtype: WireDtype, elements: number): Float32Array {
  const { buffer, byteOffset } = bytes
  if (dtype === 'float32') return new Float32Array(buffer, byteOffset, elements)
  if (isBlockDtype(dtype)) {
    const values = new Float32Array(elements)
    decodeBlocks(bytes, dtype, values)
    return values
  }
  const patterns = new Uint16Array(buffer, byteOffset, elements)
  if (dtype === 'bfloat16') return Float32Array.from(patterns, bfloat16ToNumber)
  const values = float16Values()
  return Float32Array.from(patterns, (pattern) => values[pattern])
}
