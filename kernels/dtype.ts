/** The element types of tensors that kernels read and write: `bytes` of one, and its number in ONNX's TensorProto. */
export const DTYPES = {
  float32: { bytes: 4, onnx: 1 },
  bfloat16: { bytes: 2, onnx: 16 },
  float16: { bytes: 2, onnx: 10 },
} as const

/**
 * The types in which a tensor travels as integers in blocks: so many elements share one scale, a bfloat16 in front of
 * the block's integers, each of which has `bits` bits and lies between -`most` and `most`. An element is integer ·
 * scale (docs/protocol.md, Tensors in blocks).
 */
export const BLOCK_DTYPES = {
  int8_block256: { elements: 256, bits: 8, most: 127 },
  int4_block64: { elements: 64, bits: 4, most: 7 },
} as const

export type Dtype = keyof typeof DTYPES
export type BlockDtype = keyof typeof BLOCK_DTYPES
/** What a tensor of a frame may be made of. */
export type WireDtype = Dtype | BlockDtype

export const WIRE_DTYPES: readonly string[] = [...Object.keys(DTYPES), ...Object.keys(BLOCK_DTYPES)]

/** The bytes of a block's scale. */
export const SCALE_BYTES = 2

export function bytesPerElement(dtype: Dtype): number {
  return DTYPES[dtype].bytes
}

export function isDtype(value: unknown): value is Dtype {
  return typeof value === 'string' && Object.hasOwn(DTYPES, value)
}

export function isBlockDtype(value: unknown): value is BlockDtype {
  return typeof value === 'string' && Object.hasOwn(BLOCK_DTYPES, value)
}

export function isWireDtype(value: unknown): value is WireDtype {
  return isDtype(value) || isBlockDtype(value)
}

/** The type in which kernels read or write a tensor that travels as `dtype`: one in blocks is float32 to them. */
export function kernelDtype(dtype: WireDtype): Dtype {
  return isDtype(dtype) ? dtype : 'float32'
}

/** Elements that travel together: what is cut between two tensors is cut at multiples of so many. */
export function elementsPerBlock(dtype: WireDtype): number {
  return isDtype(dtype) ? 1 : BLOCK_DTYPES[dtype].elements
}

/** The bytes of a tensor of so many elements as it travels. */
export function tensorBytes(dtype: WireDtype, elements: number): number {
  if (isDtype(dtype)) return elements * DTYPES[dtype].bytes
  const block = BLOCK_DTYPES[dtype]
  const rest = elements % block.elements
  const whole = (elements - rest) / block.elements
  return whole * blockBytes(dtype, block.elements) + (rest === 0 ? 0 : blockBytes(dtype, rest))
}

function blockBytes(dtype: BlockDtype, elements: number): number {
  return SCALE_BYTES + Math.ceil((elements * BLOCK_DTYPES[dtype].bits) / 8)
}
