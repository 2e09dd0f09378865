import type { SafetensorsDtype } from '../store/safetensors.js'

/** torch's and numpy's name of each type of safetensors. */
export const DTYPE_NAMES: Readonly<Record<SafetensorsDtype, string>> = {
  F32: 'float32',
  BF16: 'bfloat16',
  F16: 'float16',
  I64: 'int64',
  I32: 'int32',
}

/** The bytes of an element of each type that an optimizer's file may have, by torch's and numpy's name. */
export const ELEMENT_BYTES: Readonly<Record<string, number>> = {
  float32: 4,
  bfloat16: 2,
  float16: 2,
  float64: 8,
  int64: 8,
  int32: 4,
}

/** The strides, in elements, of a tensor in C order: its last dimension lies densely. */
export function rowStrides(shape: readonly number[]): number[] {
  return shape.map((_, i) => shape.slice(i + 1).reduce((product, size) => product * size, 1))
}
