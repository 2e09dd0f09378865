import type { Dtype } from '../../../kernels/dtype.js'
import type { Extent } from '../../wire/ranges.js'

// Looking at so many bytes takes about a millisecond.
const BYTES_PER_YIELD = 1 << 20

/**
 * Whether part of a tensor holds NaN or Inf: a number of which all bits of the exponent are set. Yields from time to
 * time.
 */
export function* findingNotFinite(tensor: Uint8Array, extent: Extent, dtype: Dtype): Generator<undefined, boolean> {
  const bytes = new DataView(tensor.buffer, tensor.byteOffset, tensor.byteLength)
  for (let position = 0; position < extent.bytes; position += BYTES_PER_YIELD) {
    if (position > 0) yield
    for (const piece of extent.pieces(position, Math.min(BYTES_PER_YIELD, extent.bytes - position)))
      if (!areFinite(bytes, piece, dtype)) return true
  }
  return false
}

function areFinite(bytes: DataView, { offset, length }: { offset: number; length: number }, dtype: Dtype): boolean {
  const unit = dtype === 'float32' ? 4 : 2
  const mask = EXPONENTS[dtype]
  for (let at = offset; at < offset + length; at += unit) {
    const word = unit === 4 ? bytes.getUint32(at, true) : bytes.getUint16(at, true)
    if ((word & mask) === mask) return false
  }
  return true
}

const EXPONENTS: Readonly<Record<Dtype, number>> = { float32: 0x7f800000, bfloat16: 0x7f80, float16: 0x7c00 }
