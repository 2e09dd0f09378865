/** The element types that a frame may carry: `bytes` of one element, and its number in ONNX's TensorProto.DataType. */
export const DTYPES = {
  float32: { bytes: 4, onnx: 1 },
  bfloat16: { bytes: 2, onnx: 16 },
  float16: { bytes: 2, onnx: 10 },
} as const

export type Dtype = keyof typeof DTYPES

export function bytesPerElement(dtype: Dtype): number {
  return DTYPES[dtype].bytes
}

export function isDtype(value: unknown): value is Dtype {
  return typeof value === 'string' && Object.hasOwn(DTYPES, value)
}
