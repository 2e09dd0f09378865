import { BLOCK_DTYPES, type BlockDtype, SCALE_BYTES, tensorBytes } from './dtype.js'
import { bfloat16ToNumber, numberToBfloat16 } from './narrow.js'

/** The scale of a block that holds NaN or Inf: with it every element of the block is NaN. */
const NOT_FINITE = 0x7fc0
/** Less this, a float64 plus this is rounded to an integer, ties to even: above 2^52 a unit is the last bit. */
const ROUNDING = 1.5 * 2 ** 52

/**
 * Decodes a tensor in blocks. Every element is exact: an integer of at most eight bits times a scale of eight
 * significant bits is a float32. A scale that is NaN or Inf makes every element of its block NaN or Inf.
 */
export function decodeBlocks(bytes: Uint8Array, dtype: BlockDtype, values: Float32Array): void {
  const decode = dtype === 'int8_block256' ? decodeInt8 : decodeInt4
  const { elements } = BLOCK_DTYPES[dtype]
  let at = 0
  for (let first = 0; first < values.length; first += elements) {
    const scale = bfloat16ToNumber(bytes[at] | (bytes[at + 1] << 8))
    at = decode(bytes, at + SCALE_BYTES, values, { first, end: Math.min(first + elements, values.length), scale })
  }
}

/** Whether every element of a tensor in blocks is finite. */
export function areBlocksFinite(bytes: Uint8Array, dtype: BlockDtype): boolean {
  const { elements, bits } = BLOCK_DTYPES[dtype]
  const width = tensorBytes(dtype, elements)
  const values = new Float32Array(elements)
  for (let at = 0; at < bytes.length; at += width) {
    const scale = bfloat16ToNumber(bytes[at] | (bytes[at + 1] << 8))
    // The largest magnitude that an integer has; a comparison with NaN is false.
    if (Math.fround(Math.abs(scale) * 2 ** (bits - 1)) < Infinity) continue
    const block = bytes.subarray(at, at + width)
    const some = values.subarray(0, ((block.length - SCALE_BYTES) * 8) / bits)
    decodeBlocks(block, dtype, some)
    if (!some.every(Number.isFinite)) return false
  }
  return true
}

/**
 * Encodes float32 numbers in blocks (docs/protocol.md, Tensors in blocks): scale = bfloat16(max |x| / most), and each
 * integer is x / scale, rounded to even. Answers the sum of the squares of what the blocks decode to, in float64.
 */
export function encodeBlocks(values: Float32Array, dtype: BlockDtype, bytes: Uint8Array): number {
  const { elements, bits, most } = BLOCK_DTYPES[dtype]
  // An odd number of elements has a zero behind it.
  const integers = new Int8Array(elements)
  const store = bits === 8 ? storeInt8 : storeInt4
  let at = 0
  let squares = 0
  for (let first = 0; first < values.length; first += elements) {
    const end = Math.min(first + elements, values.length)
    const pattern = scaleOf(values, first, end, most)
    const scale = bfloat16ToNumber(pattern)
    bytes[at++] = pattern & 0xff
    bytes[at++] = pattern >> 8
    squares += quantize(values, { first, end, scale }, most, integers) * scale ** 2
    at = store(integers, end - first, bytes, at)
  }
  return squares
}

/** The bytes of float32 numbers in blocks. */
export function blocksOf(values: Float32Array, dtype: BlockDtype): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(tensorBytes(dtype, values.length))
  encodeBlocks(values, dtype, bytes)
  return bytes
}

/** The elements of one block, and its scale. */
type Block = { first: number; end: number; scale: number }

function decodeInt8(bytes: Uint8Array, from: number, values: Float32Array, { first, end, scale }: Block): number {
  let at = from
  for (let i = first; i < end; i++) values[i] = ((bytes[at++] << 24) >> 24) * scale
  return at
}

function decodeInt4(bytes: Uint8Array, from: number, values: Float32Array, { first, end, scale }: Block): number {
  let at = from
  for (let i = first; i < end; i += 2) {
    const pair = bytes[at++]
    values[i] = ((pair << 28) >> 28) * scale
    // Behind the last of an odd number of elements there is none: a typed array ignores what is written there.
    values[i + 1] = ((pair << 24) >> 28) * scale
  }
  return at
}

/** The bits of a block's scale. */
function scaleOf(values: Float32Array, first: number, end: number, most: number): number {
  let largest = 0
  for (let i = first; i < end; i++) {
    const magnitude = Math.abs(values[i])
    // A comparison with NaN is false.
    if (!(magnitude < Infinity)) return NOT_FINITE
    if (magnitude > largest) largest = magnitude
  }
  return numberToBfloat16(Math.fround(largest / most))
}

/** Writes a block's integers, and answers the sum of their squares. A scale of 0 or NaN leaves zeros. */
function quantize(values: Float32Array, { first, end, scale }: Block, most: number, integers: Int8Array): number {
  integers.fill(0)
  if (!(scale > 0)) return 0
  let squares = 0
  for (let i = first; i < end; i++) {
    const rounded = Math.fround(values[i] / scale) + ROUNDING - ROUNDING
    // A subnormal scale has few bits: quotients may lie beyond the range.
    const integer = rounded > most ? most : rounded < -most ? -most : rounded
    integers[i - first] = integer
    squares += integer * integer
  }
  return squares
}

function storeInt8(integers: Int8Array, count: number, bytes: Uint8Array, at: number): number {
  for (let i = 0; i < count; i++) bytes[at + i] = integers[i]
  return at + count
}

/** The first of two elements has the lower four bits. */
function storeInt4(integers: Int8Array, count: number, bytes: Uint8Array, from: number): number {
  let at = from
  for (let i = 0; i < count; i += 2) bytes[at++] = (integers[i] & 0xf) | (integers[i + 1] << 4)
  return at
}
