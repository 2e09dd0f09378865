/**
 * A WebAssembly assembler for one module of a few numeric loops. Instructions nest like expressions:
 * `i64.add(local.get(a), i64.const(1n))` is the bytes of both operands, then the opcode.
 * Source: WebAssembly Core Specification 2.0, section 5 (binary format), with fixed-width SIMD.
 */
export type Code = readonly number[]

/** A function, exported by its name. Its results go through the memory. Locals are numbered after the parameters. */
export type WasmFunction = {
  name: string
  parameters: readonly ValueType[]
  locals: readonly ValueType[]
  body: Code
}

/** A function of a module. */
export type WasmEntry = (...values: number[]) => void

export type WasmInstance = {
  memory: Uint8Array<ArrayBuffer>
  /** The function that is exported by this name. */
  entry: (name: string) => WasmEntry
}

/** Memory is made in pages of so many bytes. */
export const PAGE = 65_536

const VALUE_TYPES = { i32: 0x7f, i64: 0x7e, v128: 0x7b } as const

export type ValueType = keyof typeof VALUE_TYPES

/** Compiles and instantiates a module of `assemble`. Throws WebAssembly.CompileError where the engine has no SIMD. */
export function instantiate(module: Uint8Array): WasmInstance {
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(module))
  const { memory } = exports
  if (!(memory instanceof WebAssembly.Memory)) throw new TypeError('the WebAssembly module exports no memory')
  const entry = (name: string): WasmEntry => {
    const found = exports[name]
    if (!isEntry(found)) throw new TypeError(`the WebAssembly module exports no function '${name}'`)
    return found
  }
  return { memory: new Uint8Array(memory.buffer), entry }
}

function isEntry(value: unknown): value is WasmEntry {
  return typeof value === 'function'
}

/** The bytes of a module that exports the functions and `memory`, which has `pages` pages of 64 KiB and never grows. */
export function assemble(pages: number, functions: readonly WasmFunction[]): Uint8Array {
  const types = functions.map(({ parameters }) => [
    0x60,
    ...vector(parameters.map((type) => [VALUE_TYPES[type]])),
    0x00,
  ])
  const exported = functions.map(({ name }, index) => [...text(name), 0x00, ...unsigned(index)])
  return Uint8Array.from([
    ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00],
    ...section(1, vector(types)),
    ...section(3, vector(functions.map((_, index) => unsigned(index)))),
    ...section(5, vector([[0x01, ...unsigned(pages), ...unsigned(pages)]])),
    ...section(7, vector([[...text('memory'), 0x02, 0x00], ...exported])),
    ...section(10, vector(functions.map(functionBody))),
  ])
}

export const local = {
  get: (index: number): Code => [0x20, ...unsigned(index)],
  set: (index: number, value: Code): Code => [...value, 0x21, ...unsigned(index)],
  tee: (index: number, value: Code): Code => [...value, 0x22, ...unsigned(index)],
}

export const i32 = {
  const: (value: number): Code => [0x41, ...signed(BigInt(value))],
  add: operation(0x6a),
  lessUnsigned: operation(0x49),
}

export const i64 = {
  const: (value: bigint): Code => [0x42, ...signed(BigInt.asIntN(64, value))],
  load: access([0x29], 3),
  store: access([0x37], 3),
  add: operation(0x7c),
  mul: operation(0x7e),
  xor: operation(0x85),
  shiftRightUnsigned: operation(0x88),
}

export const v128 = {
  load: access([0xfd, 0x00], 4),
  /** Loads eight bytes into the low half and zeros into the high half. */
  loadLow: access([0xfd, 0x5d], 3),
  store: access([0xfd, 0x0b], 4),
  /** A constant of four equal 32-bit lanes. */
  splat: (lane: number): Code => [0xfd, 0x0c, ...[0, 1, 2, 3].flatMap(() => littleEndian32(lane))],
  and: vectorOperation(0x4e),
  or: vectorOperation(0x50),
  /** (one, other, mask): the bits of `one` where the mask has a 1, of `other` where it has a 0. */
  select: vectorOperation(0x52),
  /** The high half in both halves. */
  high: (value: Code): Code => shuffle(value, value, [4, 5, 6, 7, 4, 5, 6, 7]),
  i16x8: {
    maxSigned: vectorOperation(0x98),
    /** Eight lanes of (low, high), each of four unsigned numbers that fit in 16 bits. */
    narrowUnsigned: vectorOperation(0x86),
    /** The first four lanes of two vectors in turns: one, other, one, other, … */
    interleaveLow: (one: Code, other: Code): Code => shuffle(one, other, [0, 8, 1, 9, 2, 10, 3, 11]),
    interleaveHigh: (one: Code, other: Code): Code => shuffle(one, other, [4, 12, 5, 13, 6, 14, 7, 15]),
  },
  i32x4: {
    lessSigned: vectorOperation(0x39),
    /** The first, and the last, four of eight unsigned 16-bit lanes. */
    extendLow: vectorOperation(0xa9),
    extendHigh: vectorOperation(0xaa),
    shiftLeft: vectorOperation(0xab),
    shiftRightUnsigned: vectorOperation(0xad),
    add: vectorOperation(0xae),
    sub: vectorOperation(0xb1),
    maxSigned: vectorOperation(0xb8),
  },
  f32x4: {
    sqrt: vectorOperation(0xe3),
    add: vectorOperation(0xe4),
    sub: vectorOperation(0xe5),
    mul: vectorOperation(0xe6),
    div: vectorOperation(0xe7),
    max: vectorOperation(0xe9),
  },
  f64x2: { promoteLow: vectorOperation(0x5f), add: vectorOperation(0xf0), mul: vectorOperation(0xf2) },
}

/** Runs `body` as long as `condition` (an i32) holds; not at all if it does not hold at first. */
export function whileLoop(condition: Code, body: Code): Code {
  return [...condition, 0x04, 0x40, 0x03, 0x40, ...body, ...condition, 0x0d, 0x00, 0x0b, 0x0b]
}

/** A local variable of a function that is being written. */
export type Variable = { readonly get: Code; set(value: Code): void }

/** A function that is being written from its first instruction to its last. A value that is named has its own local. */
export class FunctionWriter {
  readonly #parameters: readonly ValueType[]
  readonly #locals: ValueType[] = []
  #code: number[] = []

  constructor(parameters: readonly ValueType[]) {
    this.#parameters = parameters
  }

  do(code: Code): void {
    this.#code.push(...code)
  }

  variable(value: Code, type: ValueType = 'v128'): Variable {
    const index = this.#parameters.length + this.#locals.push(type) - 1
    this.do(local.set(index, value))
    return { get: local.get(index), set: (next) => this.do(local.set(index, next)) }
  }

  /** Computes a value once; the result reads it. */
  let(value: Code): Code {
    return this.variable(value).get
  }

  /** Repeats what `write` writes as long as `condition` (an i32) holds; not at all if it does not hold at first. */
  while(condition: Code, write: () => void): void {
    const before = this.#code
    this.#code = []
    write()
    const body = this.#code
    this.#code = before
    this.do(whileLoop(condition, body))
  }

  end(name: string): WasmFunction {
    return { name, parameters: this.#parameters, locals: this.#locals, body: this.#code }
  }
}

function operation(opcode: number) {
  return (...operands: Code[]): Code => [...operands.flat(), opcode]
}

function vectorOperation(opcode: number) {
  return (...operands: Code[]): Code => [...operands.flat(), 0xfd, ...unsigned(opcode)]
}

/** Eight 16-bit lanes out of the sixteen of two vectors. */
function shuffle(one: Code, other: Code, lanes: readonly number[]): Code {
  return [...one, ...other, 0xfd, 0x0d, ...lanes.flatMap((lane) => [2 * lane, 2 * lane + 1])]
}

/** A load (address) or store (address, value) at `address + offset`; the alignment is a hint, not a demand. */
function access(opcode: Code, alignment: number) {
  return (offset: number, ...operands: Code[]): Code => [...operands.flat(), ...opcode, alignment, ...unsigned(offset)]
}

function functionBody({ locals, body }: WasmFunction): Code {
  const code = [...vector(locals.map((type) => [0x01, VALUE_TYPES[type]])), ...body, 0x0b]
  return [...unsigned(code.length), ...code]
}

function section(id: number, content: Code): Code {
  return [id, ...unsigned(content.length), ...content]
}

function vector(items: readonly Code[]): Code {
  return [...unsigned(items.length), ...items.flat()]
}

function text(value: string): Code {
  const bytes = new TextEncoder().encode(value)
  return [...unsigned(bytes.length), ...bytes]
}

function littleEndian32(value: number): Code {
  return [value & 0xff, (value >>> 8) & 0xff, (value >>> 16) & 0xff, value >>> 24]
}

/** Unsigned LEB128 of an integer below 2^31. */
function unsigned(value: number): Code {
  return value < 0x80 ? [value] : [(value & 0x7f) | 0x80, ...unsigned(value >>> 7)]
}

/** Signed LEB128: it ends where all bits that are left equal bit 6 of the last byte, its sign. */
function signed(value: bigint): Code {
  const low = Number(value & 0x7fn)
  const rest = value >> 7n
  const ends = rest === ((low & 0x40) === 0 ? 0n : -1n)
  return ends ? [low] : [low | 0x80, ...signed(rest)]
}

// @types/node 20 leaves WebAssembly to lib.dom, which a server has no other use for.
declare namespace WebAssembly {
  class Module {
    constructor(bytes: Uint8Array)
  }
  class Instance {
    constructor(module: Module)
    readonly exports: Readonly<Record<string, unknown>>
  }
  class Memory {
    readonly buffer: ArrayBuffer
  }
}
