import { bytesPerElement, type Dtype } from '../../../kernels/dtype.js'
import { FINGERPRINT, mix } from '../../../kernels/fingerprint.js'
import {
  type Code,
  i32,
  i64,
  local,
  type ValueType,
  v128,
  type WasmEntry,
  type WasmFunction,
  whileLoop,
} from './wasm.js'

/** The result of one pass over a tensor's bytes. `squareSum` means nothing unless `finite`. */
export type Scan = {
  /** 64 bits that depend on every bit and its position (kernels/fingerprint.ts). */
  fingerprint: bigint
  /** Whether no element is NaN or infinite. */
  finite: boolean
  /** Σ x² in float64. The order of the sum depends on length and dtype alone: equal bytes give equal bits. */
  squareSum: number
}

const BLOCK = 64
const ACCUMULATORS = 4

// Offsets from the first byte of a scan's record in the module's memory.
const RECORD = {
  sum: 0,
  key: 8,
  step: 16,
  first: 24,
  second: 32,
  largest: 48,
  squares: 64,
  end: 64 + 16 * ACCUMULATORS,
} as const

/** The bytes of the record that goes from one call of a scan to the next. */
export const SCAN_BYTES = RECORD.end

const POSITION = 0
const BLOCKS_END = 1
const END = 2
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

const PARAMETERS: readonly ValueType[] = ['i32', 'i32', 'i32']
const LOCALS: readonly ValueType[] = [
  ...(['i64', 'i64', 'i64', 'i64', 'i64', 'i64'] as const),
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

/**
 * A function that scans a range of the memory: (position, blocksEnd, end) are addresses. It takes whole blocks up to
 * `blocksEnd`, then words up to `end`, and adds them to the record at the address `record`. The bytes between the last
 * element and a word's end must be zero.
 */
export function scanFunction(name: string, dtype: Dtype, record: number): WasmFunction {
  const block = Array.from({ length: BLOCK / 16 }, (_, part) => [
    ...fingerprintWord(part * 16),
    ...fingerprintWord(part * 16 + 8),
    ...local.set(LOADED, v128.load(part * 16, local.get(POSITION))),
    ...squares(dtype, part * 2),
  ])
  const word = [...fingerprintWord(0), ...local.set(LOADED, v128.loadLow(0, local.get(POSITION))), ...squares(dtype, 0)]
  const body = [
    ...loadRecord(record),
    ...whileLoop(i32.lessUnsigned(local.get(POSITION), local.get(BLOCKS_END)), [...block.flat(), ...advance(BLOCK)]),
    ...whileLoop(i32.lessUnsigned(local.get(POSITION), local.get(END)), [...word, ...advance(8)]),
    ...storeRecord(record),
  ]
  return { name, parameters: PARAMETERS, locals: LOCALS, body }
}

/** One scan after the other with one function of `scanFunction`, in windows that begin at the address `window`. */
export class WindowScan {
  readonly #memory: Uint8Array
  readonly #view: DataView
  readonly #call: WasmEntry
  readonly #dtype: Dtype
  readonly #record: number
  readonly #window: number

  constructor(
    { memory, call }: { memory: Uint8Array<ArrayBuffer>; call: WasmEntry },
    { dtype, record, window }: { dtype: Dtype; record: number; window: number },
  ) {
    this.#memory = memory
    this.#view = new DataView(memory.buffer)
    this.#call = call
    this.#dtype = dtype
    this.#record = record
    this.#window = window
    this.#view.setBigUint64(record + RECORD.step, FINGERPRINT.step, true)
    this.#view.setBigUint64(record + RECORD.first, FINGERPRINT.first, true)
    this.#view.setBigUint64(record + RECORD.second, FINGERPRINT.second, true)
  }

  /** Begins with another tensor. */
  reset(): void {
    this.#view.setBigUint64(this.#record + RECORD.sum, 0n, true)
    this.#view.setBigUint64(this.#record + RECORD.key, FINGERPRINT.step, true)
    this.#memory.fill(0, this.#record + RECORD.largest, this.#record + RECORD.end)
  }

  /** Scans the next `bytes` bytes, which lie in the window. All windows but the last are of whole blocks. */
  add(bytes: number): void {
    const start = this.#window
    if (bytes % 8 > 0) this.#memory.fill(0, start + bytes, start + bytes + 8 - (bytes % 8))
    this.#call(start, start + bytes - (bytes % BLOCK), start + bytes)
  }

  /** What the windows since `reset` came to, which were of `bytes` bytes together. */
  result(bytes: number): Scan {
    const sum = this.#view.getBigUint64(this.#record + RECORD.sum, true)
    return {
      fingerprint: BigInt.asUintN(64, sum + mix(BigInt(bytes))),
      finite: this.#largestMagnitude() < DECODE[this.#dtype].infinity,
      squareSum: this.#squareSum(),
    }
  }

  #largestMagnitude(): number {
    const wide = DECODE[this.#dtype].wide
    const width = bytesPerElement(this.#dtype)
    let largest = 0
    for (let lane = 0; lane < 16; lane += width) {
      const at = this.#record + RECORD.largest + lane
      largest = Math.max(largest, wide ? this.#view.getInt32(at, true) : this.#view.getInt16(at, true))
    }
    return largest
  }

  #squareSum(): number {
    let sum = 0
    for (let at: number = RECORD.squares; at < RECORD.end; at += 8)
      sum += this.#view.getFloat64(this.#record + at, true)
    return sum
  }
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

function loadRecord(record: number): Code {
  const word = (index: number, at: number) => local.set(index, i64.load(record + at, i32.const(0)))
  const lanes = (index: number, at: number) => local.set(index, v128.load(record + at, i32.const(0)))
  return [
    ...word(SUM, RECORD.sum),
    ...word(KEY, RECORD.key),
    // The constants are loaded from memory, because the engine would rebuild one of 64 bits at every use.
    ...word(STEP_LOCAL, RECORD.step),
    ...word(FIRST_LOCAL, RECORD.first),
    ...word(SECOND_LOCAL, RECORD.second),
    ...lanes(LARGEST, RECORD.largest),
    ...accumulators().flatMap(({ index, at }) => lanes(index, at)),
  ]
}

function storeRecord(record: number): Code {
  return [
    ...i64.store(record + RECORD.sum, i32.const(0), local.get(SUM)),
    ...i64.store(record + RECORD.key, i32.const(0), local.get(KEY)),
    ...v128.store(record + RECORD.largest, i32.const(0), local.get(LARGEST)),
    ...accumulators().flatMap(({ index, at }) => v128.store(record + at, i32.const(0), local.get(index))),
  ]
}

function accumulators(): readonly { index: number; at: number }[] {
  return Array.from({ length: ACCUMULATORS }, (_, i) => ({ index: SQUARES + i, at: RECORD.squares + 16 * i }))
}
