// Sixteen-bit floating point numbers as raw bits: bfloat16 and IEEE 754 binary16.

const bits = new Uint32Array(1)
const float = new Float32Array(bits.buffer)

/** The value of each binary16 bit pattern; 256 KiB that stay in the second-level cache, built on first use. */
let halves: Float32Array | undefined

export function float16Values(): Float32Array {
  halves ??= Float32Array.from({ length: 0x10000 }, (_, pattern) => float16ToNumber(pattern))
  return halves
}

/** (-1)^sign · 2^(exponent - 15) · 1.fraction; exponent 0 is subnormal, 31 is infinity or NaN. */
function float16ToNumber(pattern: number): number {
  const sign = pattern & 0x8000 ? -1 : 1
  const exponent = (pattern >> 10) & 0x1f
  const fraction = pattern & 0x3ff
  if (exponent === 0x1f) return fraction === 0 ? sign * Infinity : NaN
  if (exponent === 0) return sign * fraction * 2 ** -24
  return sign * (1024 + fraction) * 2 ** (exponent - 25)
}

/** The float32 whose upper half is `pattern`: every bfloat16 is exact in float32. */
export function bfloat16ToNumber(pattern: number): number {
  bits[0] = pattern << 16
  return float[0]
}

/**
 * Rounds a number to the nearest bfloat16, ties to even, once. Going through float32 rounds twice, which is wrong only
 * where that first rounding landed on a tie: there the number itself says on which side of the tie it was.
 */
export function numberToBfloat16(value: number): number {
  float[0] = value
  const pattern = bits[0]
  const upper = pattern >>> 16
  if (Number.isNaN(value)) return upper | 0x40
  const lower = pattern & 0xffff
  if (lower !== 0x8000) return lower > 0x8000 ? upper + 1 : upper
  const excess = Math.abs(value) - Math.abs(float[0])
  return excess > 0 || (excess === 0 && upper & 1) ? upper + 1 : upper
}
