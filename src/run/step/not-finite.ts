import { elementsPerBlock, isDtype, tensorBytes, type WireDtype } from '../../../kernels/dtype.js'
import type { Extent } from '../../wire/ranges.js'

// Looking at so many bytes takes about a millisecond.
const BYTES_PER_YIELD = 1 << 20

/**
 * Whether part of a tensor holds NaN or Inf: a number of which all bits of the exponent are set, or a scale of which
 * they are. Yields from time to time.
 */
export function* findingNotFinite(tensor: Uint8Array, extent: Extent, dtype: WireDtype): Generator<undefined, boolean> {
  const bytes = new DataView(tensor.buffer, tensor.byteOffset, tensor.byteLength)
  // A part of a tensor in blocks is whole blocks: one is never divided.
  const unit = tensorBytes(dtype, elementsPerBlock(dtype))
  const most = BYTES_PER_YIELD - (BYTES_PER_YIELD % unit)
  for (let position = 0; position < extent.bytes; position += most) {
    if (position > 0) yield
    for (const piece of extent.pieces(position, Math.min(most, extent.bytes - position)))
      if (!areFinite(bytes, { ...piece, unit }, dtype)) return true
  }
  return false
}

type Units = { offset: number; length: number; unit: number }

function areFinite(bytes: DataView, { offset, length, unit }: Units, dtype: WireDtype): boolean {
  const mask = isDtype(dtype) ? EXPONENTS[dtype] : EXPONENTS.bfloat16
  for (let at = offset; at < offset + length; at += unit) {
    const word = dtype === 'float32' ? bytes.getUint32(at, true) : bytes.getUint16(at, true)
    if ((word & mask) === mask) return false
  }
  return true
}

const EXPONENTS = { float32: 0x7f800000, bfloat16: 0x7f80, float16: 0x7c00 } as const
