// Writes Python's pickle format, protocol 2, as far as torch's files need it. No value is memoized: torch does not
// need that.

/** A Python value that has no plain counterpart in JavaScript. */
export type PickleNode =
  | { kind: 'int'; value: number }
  | { kind: 'float'; value: number }
  | { kind: 'tuple' | 'list'; items: readonly Picklable[] }
  | { kind: 'dict'; entries: readonly (readonly [Picklable, Picklable])[] }
  | { kind: 'global'; module: string; name: string }
  | { kind: 'call'; callable: Picklable; args: readonly Picklable[] }
  | { kind: 'object'; type: Picklable; state: Picklable }
  | { kind: 'persistent'; id: Picklable }
export type Picklable = PickleNode | string | boolean | null

export const int = (value: number): PickleNode => ({ kind: 'int', value })
export const float = (value: number): PickleNode => ({ kind: 'float', value })
export const tuple = (...items: readonly Picklable[]): PickleNode => ({ kind: 'tuple', items })
export const list = (items: readonly Picklable[]): PickleNode => ({ kind: 'list', items })
/** A dict in the order given. */
export const dict = (entries: readonly (readonly [Picklable, Picklable])[]): PickleNode => ({ kind: 'dict', entries })
/** A function or a class, by its name. */
export const global = (module: string, name: string): PickleNode => ({ kind: 'global', module, name })
/** The value of `callable(*args)`. */
export const call = (callable: Picklable, ...args: readonly Picklable[]): PickleNode => ({
  kind: 'call',
  callable,
  args,
})
/** An instance that is made without its constructor and then given its state. */
export const object = (type: Picklable, state: Picklable): PickleNode => ({ kind: 'object', type, state })
/** A value outside of the pickle, which its reader finds by `id`: a storage of torch. */
export const persistent = (id: Picklable): PickleNode => ({ kind: 'persistent', id })

const OP = {
  proto: '\x80\x02',
  stop: '.',
  none: 'N',
  true: '\x88',
  false: '\x89',
  mark: '(',
  tuple: 't',
  emptyTuple: ')',
  emptyList: ']',
  appends: 'e',
  emptyDict: '}',
  setItems: 'u',
  reduce: 'R',
  newObject: '\x81',
  build: 'b',
  persistent: 'Q',
} as const

/** The bytes of a pickle with one value. */
export function pickle(value: Picklable): Buffer {
  const parts: Buffer[] = []
  const op = (name: keyof typeof OP) => parts.push(Buffer.from(OP[name], 'latin1'))
  const all = (values: readonly Picklable[]) => {
    for (const each of values) put(each)
  }
  const put = (node: Picklable): void => {
    if (node === null) return void op('none')
    if (typeof node === 'boolean') return void op(node ? 'true' : 'false')
    if (typeof node === 'string') return void parts.push(text(node))
    switch (node.kind) {
      case 'int':
        return void parts.push(integer(node.value))
      case 'float':
        return void parts.push(double(node.value))
      case 'global':
        return void parts.push(Buffer.from(`c${node.module}\n${node.name}\n`))
      case 'tuple':
        return putTuple(node.items)
      case 'list':
        op('emptyList')
        return items(node.items, 'appends')
      case 'dict':
        op('emptyDict')
        return items(node.entries.flat(), 'setItems')
      case 'call':
        put(node.callable)
        putTuple(node.args)
        return void op('reduce')
      case 'object':
        put(node.type)
        op('emptyTuple')
        op('newObject')
        put(node.state)
        return void op('build')
      case 'persistent':
        put(node.id)
        return void op('persistent')
    }
  }
  const putTuple = (values: readonly Picklable[]): void => {
    if (values.length === 0) return void op('emptyTuple')
    op('mark')
    all(values)
    op('tuple')
  }
  const items = (values: readonly Picklable[], end: 'appends' | 'setItems'): void => {
    op('mark')
    all(values)
    op(end)
  }
  op('proto')
  put(value)
  op('stop')
  return Buffer.concat(parts)
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value)
  const head = Buffer.alloc(5, 'X')
  head.writeUInt32LE(bytes.length, 1)
  return Buffer.concat([head, bytes])
}

/** BININT holds 32 bits with a sign; LONG1 has its length in bytes before them. */
function integer(value: number): Buffer {
  if (value === (value | 0)) {
    const bytes = Buffer.alloc(5, 'J')
    bytes.writeInt32LE(value, 1)
    return bytes
  }
  const bytes = Buffer.alloc(10, '\x8a\x08', 'latin1')
  bytes.writeBigInt64LE(BigInt(value), 2)
  return bytes
}

function double(value: number): Buffer {
  const bytes = Buffer.alloc(9, 'G')
  bytes.writeDoubleBE(value, 1)
  return bytes
}
