import type { Dtype } from '../../../kernels/dtype.js'
import { type Code, type FunctionWriter, i32, v128 } from './wasm.js'

const { f32x4, i16x8, i32x4 } = v128

// The bits of a float32 below its exponent, and of powers of two.
const FRACTION_BITS = 23
const powerOfTwo = (exponent: number) => (127 + exponent) << FRACTION_BITS
const SIGN = 0x80000000
const MAGNITUDE = 0x7fffffff

/** For each dtype the bits of the smallest float32 that rounds to infinity. */
export const OVERFLOW: Readonly<Record<Dtype, number>> = {
  float32: 0x7f800000,
  // Half a unit above the largest bfloat16, 0x7f7f, which is odd: the tie goes up.
  bfloat16: 0x7f7f8000,
  // 65520, half a unit above 65504.
  float16: 0x477ff000,
}

/** The bits without the sign: as integers they are ordered as the magnitudes are, with infinity and NaN above all. */
export function magnitudeBits(value: Code): Code {
  return v128.and(value, v128.splat(MAGNITUDE))
}

/** Eight elements as two times four float32. `load(offset)` loads 16 bytes. Infinity and NaN may become any number. */
export function decodeEight(dtype: Dtype, load: (offset: number) => Code, writer: FunctionWriter): [Code, Code] {
  if (dtype === 'float32') return [load(0), load(16)]
  const loaded = writer.let(load(0))
  if (dtype === 'bfloat16') {
    // A bfloat16 is the upper half of a float32.
    return [i16x8.interleaveLow(v128.splat(0), loaded), i16x8.interleaveHigh(v128.splat(0), loaded)]
  }
  return [float16ToFloat32(i32x4.extendLow(loaded), writer), float16ToFloat32(i32x4.extendHigh(loaded), writer)]
}

/**
 * The bits, moved to their place in a float32, need an exponent that is 112 higher. For a subnormal number the exponent
 * is one higher still, and the implied bit 2^-14 is subtracted again: the result is exact, and no subnormal operand
 * slows the processor down.
 */
function float16ToFloat32(pattern: Code, writer: FunctionWriter): Code {
  const bits = writer.let(pattern)
  const sign = v128.and(i32x4.shiftLeft(bits, i32.const(16)), v128.splat(SIGN))
  const placed = writer.let(v128.and(i32x4.shiftLeft(bits, i32.const(13)), v128.splat(0x7fff << 13)))
  const subnormal = writer.let(i32x4.lessSigned(placed, v128.splat(0x400 << 13)))
  const exponent = i32x4.add(v128.splat(112 << FRACTION_BITS), v128.and(subnormal, v128.splat(1 << FRACTION_BITS)))
  const implied = v128.and(subnormal, v128.splat(powerOfTwo(-14)))
  return v128.or(f32x4.sub(i32x4.add(exponent, placed), implied), sign)
}

/**
 * Eight elements of `dtype`, rounded to nearest, ties to even, as vectors of 16 bytes: two of float32, one of the
 * others. A number of OVERFLOW or above, infinity and NaN may become any pattern.
 */
export function encodeEight(dtype: Dtype, [low, high]: readonly [Code, Code], writer: FunctionWriter): readonly Code[] {
  if (dtype === 'float32') return [low, high]
  const round = dtype === 'bfloat16' ? bfloat16Pattern : float16Pattern
  return [i16x8.narrowUnsigned(round(low, writer), round(high, writer))]
}

/** The upper half, after half a unit of it was added; for a tie one less where the upper half is even. */
function bfloat16Pattern(value: Code, writer: FunctionWriter): Code {
  return roundedShift(writer.let(value), 16)
}

/**
 * A normal number is rounded to ten fraction bits with its exponent 112 lower. To a smaller one 0.5 is added, whose
 * unit in the last place is 2^-24, the unit of subnormal float16: the sum's fraction is the pattern.
 */
function float16Pattern(value: Code, writer: FunctionWriter): Code {
  const bits = writer.let(value)
  const sign = v128.and(i32x4.shiftRightUnsigned(bits, i32.const(16)), v128.splat(0x8000))
  const magnitude = writer.let(magnitudeBits(bits))
  const normal = roundedShift(writer.let(i32x4.sub(magnitude, v128.splat(112 << FRACTION_BITS))), 13)
  const half = v128.splat(powerOfTwo(-1))
  const small = i32x4.sub(f32x4.add(magnitude, half), half)
  const isSmall = i32x4.lessSigned(magnitude, v128.splat(powerOfTwo(-14)))
  return v128.or(v128.select(small, normal, isSmall), sign)
}

/** bits >> shift, rounded to nearest, ties to even. */
function roundedShift(bits: Code, shift: number): Code {
  const odd = v128.and(i32x4.shiftRightUnsigned(bits, i32.const(shift)), v128.splat(1))
  const half = v128.splat((1 << (shift - 1)) - 1)
  return i32x4.shiftRightUnsigned(i32x4.add(i32x4.add(bits, half), odd), i32.const(shift))
}
