import { bytesPerElement, type Dtype } from '../../../kernels/dtype.js'
import { FINGERPRINT, mix } from '../../../kernels/fingerprint.js'
import { assemble, type Code, i32, i64, instantiate, local, type ValueType, v128, whileLoop } from './wasm.js'

/** The result of one pass over a tensor's bytes. `squareSum` means nothing unless `finite`. */
export type Scan = {
  /** 64 bits that depend on every bit and its position (kernels/fingerprint.ts). */
  fingerprint: bigint
  /** Whether no element is NaN or infinite. */
  finite: boolean
  /** Σ x² in float64. The order of the sum depends on length and dtype alone: equal bytes give equal bits. */
  squareSum: number
}

/** Scans tensors in 128 KiB of memory of its own; a thread needs one. */
export type Scanner = {
  /** Reads `bytes` (little-endian, any alignment) once. Throws RangeError if the last element is incomplete. */
  scan: (bytes: Uint8Array, dtype: Dtype) => Scan
}

const WINDOW = 65_536
const BLOCK = 64
const ACCUMULATORS = 4

// Offsets in the second page of the memory: the values that go from one window to the next.
const STATE = {
  sum: WINDOW,
  key: WINDOW + 8,
  step: WINDOW + 16,
  first: WINDOW + 24,
  second: WINDOW + 32,
  largest: WINDOW + 48,
  squares: WINDOW + 64,
  end: WINDOW + 64 + 16 * ACCUMULATORS,
} as const

const BLOCKS_END = 0
const END = 1
const POSITION = 2
const SUM = 3
const KEY = 4
const WORD = 5
const STEP_LOCAL = 6
const FIRST_LOCAL = 7
const SECOND_LOCAL = 8
const LARGEST = 9
const LOADED = 10
const HALF = 11
const DOUBLE = 12
const SQUARES = 13

const PARAMETERS: readonly ValueType[] = ['i32', 'i32']
const LOCALS: readonly ValueType[] = [
  ...(['i32', 'i64', 'i64', 'i64', 'i64', 'i64', 'i64'] as const),
  ...(['v128', 'v128', 'v128', 'v128'] as const),
  ...Array.from({ length: ACCUMULATORS }, () => 'v128' as const),
]

/** For each dtype how 16 loaded bytes become float32 lanes, and the bits of a magnitude and of infinity. */
const DECODE = {
  float32: { lanes: (loaded: Code) => [loaded], magnitude: 0x7fffffff, wide: true, infinity: 0x7f800000 },
  bfloat16: { lanes: bfloat16Lanes, magnitude: 0x7fff7fff, wide: false, infinity: 0x7f80 },
  float16: { lanes: float16Lanes, magnitude: 0x7fff7fff, wide: false, infinity: 0x7c00 },
} as const satisfies Record<
  Dtype,
  { lanes: (loaded: Code) => readonly Code[]; magnitude: number; wide: boolean; infinity: number }
>

const MODULE = assemble(2, [
  { name: 'float32', parameters: PARAMETERS, locals: LOCALS, body: scanWindow('float32') },
  { name: 'bfloat16', parameters: PARAMETERS, locals: LOCALS, body: scanWindow('bfloat16') },
  { name: 'float16', parameters: PARAMETERS, locals: LOCALS, body: scanWindow('float16') },
])

export function createScanner(): Scanner {
  const { memory, call } = instantiate(MODULE)
  const state = new DataView(memory.buffer)
  state.setBigUint64(STATE.step, FINGERPRINT.step, true)
  state.setBigUint64(STATE.first, FINGERPRINT.first, true)
  state.setBigUint64(STATE.second, FINGERPRINT.second, true)
  const scan = (bytes: Uint8Array, dtype: Dtype): Scan => {
    if (bytes.length % bytesPerElement(dtype) !== 0) {
      throw new RangeError(`a ${dtype} tensor cannot have ${bytes.length} bytes`)
    }
    state.setBigUint64(STATE.sum, 0n, true)
    state.setBigUint64(STATE.key, FINGERPRINT.step, true)
    memory.fill(0, STATE.largest, STATE.end)
    for (let at = 0; at < bytes.length; at += WINDOW) {
      const length = Math.min(WINDOW, bytes.length - at)
      memory.set(bytes.subarray(at, at + length))
      memory.fill(0, length, Math.ceil(length / 8) * 8)
      call(dtype, length - (length % BLOCK), length)
    }
    return {
      fingerprint: BigInt.asUintN(64, state.getBigUint64(STATE.sum, true) + mix(BigInt(bytes.length))),
      finite: largestMagnitude(state, dtype) < DECODE[dtype].infinity,
      squareSum: squareSum(state),
    }
  }
  return { scan }
}

function largestMagnitude(state: DataView, dtype: Dtype): number {
  const width = bytesPerElement(dtype)
  const lanes = Array.from({ length: 16 / width }, (_, lane) => STATE.largest + lane * width)
  return Math.max(...lanes.map((at) => (DECODE[dtype].wide ? state.getInt32(at, true) : state.getInt16(at, true))))
}

function squareSum(state: DataView): number {
  let sum = 0
  for (let at: number = STATE.squares; at < STATE.end; at += 8) sum += state.getFloat64(at, true)
  return sum
}

/** The body of scan(blocksEnd, end): whole blocks up to `blocksEnd`, then words up to `end`, from the state page on. */
function scanWindow(dtype: Dtype): Code {
  const block = Array.from({ length: BLOCK / 16 }, (_, part) => [
    ...fingerprintWord(part * 16),
    ...fingerprintWord(part * 16 + 8),
    ...local.set(LOADED, v128.load(part * 16, local.get(POSITION))),
    ...squares(dtype, part * 2),
  ])
  const word = [...fingerprintWord(0), ...local.set(LOADED, v128.loadLow(0, local.get(POSITION))), ...squares(dtype, 0)]
  return [
    ...loadState(),
    ...whileLoop(i32.lessUnsigned(local.get(POSITION), local.get(BLOCKS_END)), [...block.flat(), ...advance(BLOCK)]),
    ...whileLoop(i32.lessUnsigned(local.get(POSITION), local.get(END)), [...word, ...advance(8)]),
    ...storeState(),
  ]
}

function advance(bytes: number): Code {
  return local.set(POSITION, i32.add(local.get(POSITION), i32.const(bytes)))
}

function fingerprintWord(offset: number): Code {
  const fold = (value: Code, bits: bigint) =>
    i64.xor(local.tee(WORD, value), i64.shiftRightUnsigned(local.get(WORD), i64.const(bits)))
  const keyed = i64.add(i64.load(offset, local.get(POSITION)), local.get(KEY))
  const [before, between, after] = FINGERPRINT.shifts
  const once = i64.mul(fold(keyed, before), local.get(FIRST_LOCAL))
  const twice = i64.mul(fold(once, between), local.get(SECOND_LOCAL))
  return [
    ...local.set(SUM, i64.add(local.get(SUM), fold(twice, after))),
    ...local.set(KEY, i64.add(local.get(KEY), local.get(STEP_LOCAL))),
  ]
}

/** Adds the squares of the loaded elements in float64, in which none overflows; `turn` chooses the accumulators. */
function squares(dtype: Dtype, turn: number): Code {
  const { lanes, magnitude, wide } = DECODE[dtype]
  const larger = wide ? v128.i32x4.maxSigned : v128.i16x8.maxSigned
  const halves = lanes(local.get(LOADED)).flatMap((four, index) => [
    ...local.set(HALF, four),
    ...addSquare(local.get(HALF), turn + 2 * index),
    ...addSquare(v128.high(local.get(HALF)), turn + 2 * index + 1),
  ])
  return [
    ...local.set(LARGEST, larger(local.get(LARGEST), v128.and(local.get(LOADED), v128.splat(magnitude)))),
    ...halves,
  ]
}

function addSquare(four: Code, turn: number): Code {
  const accumulator = SQUARES + (turn % ACCUMULATORS)
  const square = v128.f64x2.mul(local.tee(DOUBLE, v128.f64x2.promoteLow(four)), local.get(DOUBLE))
  return local.set(accumulator, v128.f64x2.add(local.get(accumulator), square))
}

/** A bfloat16 is the upper half of a float32. */
function bfloat16Lanes(loaded: Code): readonly Code[] {
  return [v128.i32x4.shiftLeft(loaded, i32.const(16)), v128.and(loaded, v128.splat(0xffff0000))]
}

/**
 * |x| of each float16 as float32: the bits, moved to their place in a float32, need an exponent that is 112 higher. For
 * a subnormal number the exponent is one higher still, and the implied bit 2^-14 is subtracted again: the result is
 * exact, and no subnormal operand slows the processor down.
 */
function float16Lanes(loaded: Code): readonly Code[] {
  const mask = v128.splat(0x7fff << 13)
  const placed = [
    v128.and(v128.i32x4.shiftLeft(loaded, i32.const(13)), mask),
    v128.and(v128.i32x4.shiftRightUnsigned(loaded, i32.const(3)), mask),
  ]
  return placed.map((bits) => {
    const magnitude = local.get(HALF)
    const subnormal = local.tee(DOUBLE, v128.i32x4.lessSigned(local.tee(HALF, bits), v128.splat(0x400 << 13)))
    const exponent = v128.i32x4.add(v128.splat(112 << 23), v128.and(subnormal, v128.splat(1 << 23)))
    const implied = v128.and(local.get(DOUBLE), v128.splat(113 << 23))
    return v128.f32x4.sub(v128.i32x4.add(exponent, magnitude), implied)
  })
}

function loadState(): Code {
  const word = (index: number, at: number) => local.set(index, i64.load(at, i32.const(0)))
  const lanes = (index: number, at: number) => local.set(index, v128.load(at, i32.const(0)))
  return [
    ...word(SUM, STATE.sum),
    ...word(KEY, STATE.key),
    // The constants are loaded from memory, because the engine would rebuild one of 64 bits at every use.
    ...word(STEP_LOCAL, STATE.step),
    ...word(FIRST_LOCAL, STATE.first),
    ...word(SECOND_LOCAL, STATE.second),
    ...lanes(LARGEST, STATE.largest),
    ...accumulators().flatMap(({ index, at }) => lanes(index, at)),
  ]
}

function storeState(): Code {
  return [
    ...i64.store(STATE.sum, i32.const(0), local.get(SUM)),
    ...i64.store(STATE.key, i32.const(0), local.get(KEY)),
    ...v128.store(STATE.largest, i32.const(0), local.get(LARGEST)),
    ...accumulators().flatMap(({ index, at }) => v128.store(at, i32.const(0), local.get(index))),
  ]
}

function accumulators(): readonly { index: number; at: number }[] {
  return Array.from({ length: ACCUMULATORS }, (_, i) => ({ index: SQUARES + i, at: STATE.squares + 16 * i }))
}
