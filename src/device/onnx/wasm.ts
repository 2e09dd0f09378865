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

export type WasmInstance = {
  memory: Uint8Array
  call: (name: string, ...values: number[]) => void
}

const VALUE_TYPES = { i32: 0x7f, i64: 0x7e, v128: 0x7b } as const

export type ValueType = keyof typeof VALUE_TYPES

/** Compiles and instantiates a module of `assemble`. Throws WebAssembly.CompileError where the engine has no SIMD. */
export function instantiate(module: Uint8Array): WasmInstance {
  const { exports } = new WebAssembly.Instance(new WebAssembly.Module(module))
  const { memory } = exports
  if (!(memory instanceof WebAssembly.Memory)) throw new TypeError('the WebAssembly module exports no memory')
  const call = (name: string, ...values: number[]) => {
    const entry = exports[name]
    if (typeof entry !== 'function') throw new TypeError(`the WebAssembly module exports no function '${name}'`)
    entry(...values)
  }
  return { memory: new Uint8Array(memory.buffer), call }
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
  /** The high half in both halves. */
  high: (value: Code): Code => [
    ...value,
    ...value,
    0xfd,
    0x0d,
    ...[0, 1].flatMap(() => [8, 9, 10, 11, 12, 13, 14, 15]),
  ],
  i16x8: { maxSigned: vectorOperation(0x98) },
  i32x4: {
    lessSigned: vectorOperation(0x39),
    shiftLeft: vectorOperation(0xab),
    shiftRightUnsigned: vectorOperation(0xad),
    add: vectorOperation(0xae),
    maxSigned: vectorOperation(0xb8),
  },
  f32x4: { sub: vectorOperation(0xe5) },
  f64x2: { promoteLow: vectorOperation(0x5f), add: vectorOperation(0xf0), mul: vectorOperation(0xf2) },
}

/** Runs `body` as long as `condition` (an i32) holds; not at all if it does not hold at first. */
export function whileLoop(condition: Code, body: Code): Code {
  return [...condition, 0x04, 0x40, 0x03, 0x40, ...body, ...condition, 0x0d, 0x00, 0x0b, 0x0b]
}

function operation(opcode: number) {
  return (...operands: Code[]): Code => [...operands.flat(), opcode]
}

function vectorOperation(opcode: number) {
  return (...operands: Code[]): Code => [...operands.flat(), 0xfd, ...unsigned(opcode)]
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
