// Reads Python's pickle format as far as torch.save writes it for the state of an optimizer. A pickle is a program
// for a stack machine, which may call any function of Python. This interpreter calls none: it knows a few by name and
// builds plain values in their stead, so nothing of the file is executed.

import { named, result, storage } from './globals.js'
import { PickleError, type PickleValue, shown } from './pickle-value.js'

/** Enough for the state of half a million parameters, each reference to a shared value counted. */
const MOST_VALUES = 2 ** 24
const MOST_DEEP = 256
/** Memory that values may take, about: an operation of one byte makes a dict of some hundred. */
const MOST_BYTES = 2 ** 30
const [DICT_BYTES, KEPT_BYTES, LIST_BYTES, VALUE_BYTES] = [256, 96, 64, 32]

/** The value of a pickle. Throws PickleError, with the name, for anything that a state dict does not need. */
export function unpickle(bytes: Uint8Array): PickleValue {
  return new Unpickler(bytes).run()
}

class Unpickler {
  readonly #bytes: Buffer
  #at = 0
  #values = 0
  #memory = 0
  /** The innermost list of values last. A mark opens another one. */
  #stacks: PickleValue[][] = [[]]
  readonly #memo = new Map<number, PickleValue>()

  constructor({ buffer, byteOffset, byteLength }: Uint8Array) {
    this.#bytes = Buffer.from(buffer, byteOffset, byteLength)
  }

  run(): PickleValue {
    for (;;) {
      const at = this.#at
      const op = String.fromCharCode(this.#byte())
      if (op === '.') return bounded(this.#pop())
      const work = OPS[op]
      if (work === undefined)
        throw new PickleError(`byte ${at} is operation ${JSON.stringify(op)}, which no state dict needs`)
      work({
        byte: () => this.#byte(),
        take: (count) => this.#take(count),
        line: () => this.#line(),
        push: (value) => this.#push(value),
        pop: () => this.#pop(),
        top: () => this.#top(),
        mark: () => this.#mark(),
        popMark: () => this.#popMark(),
        keep: (key, value) => this.#keep(key, value),
        memo: this.#memo,
      })
    }
  }

  #byte(): number {
    return this.#take(1)[0]
  }

  #take(count: number): Buffer {
    const end = this.#at + count
    if (end > this.#bytes.length)
      throw new PickleError(
        `the pickle has ${this.#bytes.length} bytes and is cut off: at byte ${this.#at} it wants ${count} more`,
      )
    const bytes = this.#bytes.subarray(this.#at, end)
    this.#at = end
    return bytes
  }

  #line(): string {
    const end = this.#bytes.indexOf(10, this.#at)
    if (end < 0) throw new PickleError(`the pickle is cut off in the name at byte ${this.#at}`)
    const bytes = this.#take(end - this.#at)
    this.#at += 1
    return bytes.toString()
  }

  get #stack(): PickleValue[] {
    return this.#stacks[this.#stacks.length - 1]
  }

  #push(value: PickleValue): void {
    this.#values += 1
    if (this.#values > MOST_VALUES) throw new PickleError(`the pickle has more than ${MOST_VALUES} values`)
    this.#takeMemory(bytesOf(value))
    this.#stack.push(value)
  }

  #keep(key: number, value: PickleValue): void {
    this.#takeMemory(KEPT_BYTES)
    this.#memo.set(key, value)
  }

  #takeMemory(bytes: number): void {
    this.#memory += bytes
    if (this.#memory > MOST_BYTES) throw new PickleError(`the values of the pickle take more than ${MOST_BYTES} bytes`)
  }

  #pop(): PickleValue {
    const value = this.#stack.pop()
    if (value === undefined) throw new PickleError(`the operation before byte ${this.#at} wants a value, there is none`)
    return value
  }

  #top(): PickleValue {
    const value = this.#pop()
    this.#stack.push(value)
    return value
  }

  #mark(): void {
    if (this.#stacks.length >= MOST_DEEP) throw new PickleError(`the pickle is nested more than ${MOST_DEEP} deep`)
    this.#stacks.push([])
  }

  #popMark(): PickleValue[] {
    if (this.#stacks.length === 1)
      throw new PickleError(`the operation before byte ${this.#at} wants a mark, there is none`)
    const [values] = this.#stacks.splice(-1, 1)
    return values
  }
}

type Machine = {
  byte(): number
  take(count: number): Buffer
  line(): string
  push(value: PickleValue): void
  pop(): PickleValue
  top(): PickleValue
  mark(): void
  /** The values that were pushed since the last mark. */
  popMark(): PickleValue[]
  keep(key: number, value: PickleValue): void
  memo: ReadonlyMap<number, PickleValue>
}

const OPS: Readonly<Record<string, (machine: Machine) => void>> = {
  // PROTO and FRAME say how the pickle was written.
  '\x80': ({ byte }) => void byte(),
  '\x95': ({ take }) => void take(8),
  N: ({ push }) => push(null),
  '\x88': ({ push }) => push(true),
  '\x89': ({ push }) => push(false),
  K: ({ byte, push }) => push(byte()),
  M: ({ take, push }) => push(take(2).readUInt16LE()),
  J: ({ take, push }) => push(take(4).readInt32LE()),
  G: ({ take, push }) => push(take(8).readDoubleBE()),
  '\x8a': ({ byte, take, push }) => push(long(take(byte()))),
  X: ({ take, push }) => push(take(take(4).readUInt32LE()).toString()),
  '\x8c': ({ byte, take, push }) => push(take(byte()).toString()),
  B: ({ take, push }) => push(take(take(4).readUInt32LE())),
  C: ({ byte, take, push }) => push(take(byte())),
  ')': ({ push }) => push([]),
  ']': ({ push }) => push([]),
  '}': ({ push }) => push(new Map()),
  '(': ({ mark }) => mark(),
  t: ({ popMark, push }) => push(popMark()),
  '\x85': ({ pop, push }) => push([pop()]),
  '\x86': ({ pop, push }) => push([pop(), pop()].reverse()),
  '\x87': ({ pop, push }) => push([pop(), pop(), pop()].reverse()),
  a: ({ pop, top }) => {
    const value = pop()
    listOf(top()).push(value)
  },
  e: ({ popMark, top }) => {
    const values = popMark()
    const list = listOf(top())
    for (const value of values) list.push(value)
  },
  s: ({ pop, top }) => {
    const [value, key] = [pop(), pop()]
    dictOf(top()).set(key, value)
  },
  u: ({ popMark, top }) => {
    const values = popMark()
    const target = dictOf(top())
    if (values.length % 2 !== 0) throw new PickleError(`a dict is given ${values.length} keys and values`)
    for (let i = 0; i < values.length; i += 2) target.set(values[i], values[i + 1])
  },
  q: ({ byte, top, keep }) => keep(byte(), top()),
  r: ({ take, top, keep }) => keep(take(4).readUInt32LE(), top()),
  '\x94': ({ top, keep, memo }) => keep(memo.size, top()),
  h: ({ byte, push, memo }) => push(recalled(memo, byte())),
  j: ({ take, push, memo }) => push(recalled(memo, take(4).readUInt32LE())),
  c: ({ line, push }) => push(named(line(), line())),
  '\x93': ({ pop, push }) => {
    const [name, module] = [pop(), pop()]
    // Nothing else becomes text: a list that holds another one twice, which does the same, would be of any length.
    if (typeof module !== 'string' || typeof name !== 'string')
      throw new PickleError(`the pickle names ${shown(name)} of ${shown(module)}`)
    push(named(module, name))
  },
  R: ({ pop, push }) => {
    const [args, callable] = [pop(), pop()]
    push(result(callable, args))
  },
  // An OrderedDict may carry attributes; those of a state dict are its version numbers.
  b: ({ pop, top }) => {
    pop()
    dictOf(top())
  },
  Q: ({ pop, push }) => push(storage(pop())),
}

function bytesOf(value: PickleValue): number {
  if (value instanceof Map) return DICT_BYTES
  return Array.isArray(value) ? LIST_BYTES : VALUE_BYTES
}

/**
 * A value that can be walked over: it neither holds itself nor is it deep, and it is not long even where what it
 * shares is counted each time. Throws PickleError.
 */
function bounded(value: PickleValue): PickleValue {
  measure(value, 1, new Map())
  return value
}

type Measure = { values: number; height: number }

function measure(value: PickleValue, depth: number, known: Map<PickleValue, Measure | 'open'>): Measure {
  if (!Array.isArray(value) && !(value instanceof Map)) return { values: 1, height: 1 }
  const before = known.get(value)
  if (before === 'open') throw new PickleError(`the pickle has ${shown(value)} that holds itself`)
  if (depth + (before?.height ?? 1) > MOST_DEEP + 1)
    throw new PickleError(`the pickle is nested more than ${MOST_DEEP} deep`)
  if (before) return before
  known.set(value, 'open')
  const whole: Measure = { values: 1, height: 1 }
  for (const part of Array.isArray(value) ? value : [...value.keys(), ...value.values()]) {
    const { values, height } = measure(part, depth + 1, known)
    whole.values += values
    whole.height = Math.max(whole.height, height + 1)
    if (whole.values > MOST_VALUES)
      throw new PickleError(`the pickle has more than ${MOST_VALUES} values, shared ones counted each time`)
  }
  known.set(value, whole)
  return whole
}

/** Little-endian, with a sign, of any length. */
function long(bytes: Buffer): number | bigint {
  let value = 0n
  for (const [i, byte] of bytes.entries()) value |= BigInt(byte) << BigInt(8 * i)
  const signed = BigInt.asIntN(8 * bytes.length, value)
  return Number.isSafeInteger(Number(signed)) ? Number(signed) : signed
}

function recalled(memo: ReadonlyMap<number, PickleValue>, index: number): PickleValue {
  const value = memo.get(index)
  if (value === undefined) throw new PickleError(`the pickle asks for value ${index} that it has not kept`)
  return value
}

function listOf(value: PickleValue): PickleValue[] {
  if (Array.isArray(value)) return value
  throw new PickleError(`the pickle uses ${shown(value)} as a list`)
}

function dictOf(value: PickleValue): Map<PickleValue, PickleValue> {
  if (value instanceof Map) return value
  throw new PickleError(`the pickle uses ${shown(value)} as a dict`)
}
