import { ServiceError } from '../errors.js'
import { type Cursor, cursorOf, ITEMS_PER_YIELD, type Kind, malformed, nextToken, type Token } from './msgpack.js'

/**
 * What a value must be. `any` is checked by a later layer. So is `hyperparameter`, but for the difference between 5 and
 * 5.0: only msgpack knows it, a JavaScript number does not. A map without `rest` refuses unknown keys.
 */
export type Schema =
  | { readonly is: 'string' | 'bool' | 'int' | 'uint' | 'float' | 'bin' | 'any' | 'hyperparameter' }
  | { readonly is: 'name'; readonly pattern: RegExp }
  | { readonly is: 'list' | 'dictionary'; readonly of: Schema }
  | MapSchema

export type MapSchema = {
  readonly is: 'map'
  readonly required: Readonly<Record<string, Schema>>
  readonly optional: Readonly<Record<string, Schema>>
  readonly rest?: Schema
}

/** Hyperparameters that count something: 5.0 is refused for them, and the service writes them as integers. */
export const INTEGER_HYPERPARAMETERS: readonly string[] = ['ns_steps']

const EXPECTED: Readonly<Record<Schema['is'], { kinds: readonly Kind[]; words: string }>> = {
  string: { kinds: ['string'], words: 'a string' },
  name: { kinds: ['string'], words: 'a string' },
  bool: { kinds: ['bool'], words: 'a bool' },
  int: { kinds: ['int'], words: 'an integer' },
  uint: { kinds: ['int'], words: 'an integer' },
  float: { kinds: ['float', 'int'], words: 'a number' },
  bin: { kinds: ['bin'], words: 'a bin' },
  list: { kinds: ['list'], words: 'a list' },
  dictionary: { kinds: ['map'], words: 'a map' },
  map: { kinds: ['map'], words: 'a map' },
  any: { kinds: ['map', 'list', 'string', 'bin', 'int', 'float', 'bool'], words: 'a value' },
  hyperparameter: { kinds: ['map', 'list', 'string', 'bin', 'int', 'float', 'bool'], words: 'a value' },
}

const ANY: Schema = { is: 'any' }

/**
 * Reads a message that `scan` has walked over and holds it against the schema. Bins are views of `bytes`; maps are
 * plain objects in which even `__proto__` is a key like any other. Yields from time to time, as `scan` does.
 * @throws ServiceError FRAME_MALFORMED with the path of the value; HYPERPARAMETER_INVALID (a float as a count)
 */
export function* readMessage(bytes: Uint8Array, schema: MapSchema, name: string): Generator<undefined, unknown> {
  const cursor = cursorOf(bytes)
  const path: Path = [name]
  const map = new Map<string, unknown>()
  const pairs = nextToken(cursor).value
  for (let pair = 0; pair < pairs; pair++) {
    const key = readKey(cursor, map, path)
    path.push(key)
    map.set(key, yield* readLongValue(cursor, schemaOf(schema, key, path), path))
    path.pop()
  }
  checkMissing(map, schema, path)
  return Object.fromEntries(map)
}

/** A value of the message's own map: only there are lists long enough to be read in several turns. */
function* readLongValue(cursor: Cursor, schema: Schema, path: Path): Generator<undefined, unknown> {
  const { position } = cursor
  const token = nextToken(cursor)
  if (schema.is !== 'list' || token.kind !== 'list') {
    cursor.position = position
    return readValue(cursor, schema, path)
  }
  const list: unknown[] = []
  for (let index = 0; index < token.value; index++) {
    if (index % ITEMS_PER_YIELD === ITEMS_PER_YIELD - 1) yield
    list.push(readItem(cursor, schema.of, { path, index }))
  }
  return list
}

/** A client's text in a message: quoted, its control characters escaped, and never longer than a line. */
export function quote(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}…` : text)
}

/** The way to the value being read; a number is a position in a list. */
type Path = (string | number)[]

function readValue(cursor: Cursor, schema: Schema, path: Path): unknown {
  const token = nextToken(cursor)
  const { kinds, words } = EXPECTED[schema.is]
  if (!kinds.includes(token.kind)) {
    const advice = token.kind === 'nil' ? '; leave the key out instead of nil' : ''
    throw malformed(`${spell(path)} is a ${token.kind}, expected ${words}${advice}`)
  }
  checkNumber(token, schema, path)
  return build(cursor, { token, schema, path })
}

function checkNumber(token: Token, schema: Schema, path: Path): void {
  if (schema.is === 'uint' && token.value < 0) throw malformed(`${spell(path)} is ${token.value}, expected 0 or more`)
  if (schema.is !== 'hyperparameter' || token.kind !== 'float') return
  const name = String(path.at(-1))
  if (INTEGER_HYPERPARAMETERS.includes(name)) {
    throw new ServiceError('HYPERPARAMETER_INVALID', `${spell(path)} is the float ${token.value}, expected an integer`)
  }
}

type Reading = { token: Token; schema: Schema; path: Path }

function build(cursor: Cursor, reading: Reading): unknown {
  const { token } = reading
  if (token.kind === 'map') return buildMap(cursor, reading)
  if (token.kind === 'list') return buildList(cursor, reading)
  if (token.kind === 'bool') return token.value === 1
  if (token.kind === 'string') return buildString(cursor, reading)
  if (token.kind === 'bin') return payload(cursor, token.value)
  return token.value
}

function buildList(cursor: Cursor, { token, schema, path }: Reading): unknown[] {
  const of = schema.is === 'list' ? schema.of : ANY
  const list: unknown[] = []
  for (let index = 0; index < token.value; index++) list.push(readItem(cursor, of, { path, index }))
  return list
}

function readItem(cursor: Cursor, schema: Schema, { path, index }: { path: Path; index: number }): unknown {
  path.push(index)
  const value = readValue(cursor, schema, path)
  path.pop()
  return value
}

function readKey(cursor: Cursor, map: ReadonlyMap<string, unknown>, path: Path): string {
  const key = payload(cursor, nextToken(cursor).value).toString()
  if (map.has(key)) throw malformed(`${spell(path)} has the key ${quote(key)} twice`)
  return key
}

function buildMap(cursor: Cursor, { token, schema, path }: Reading): Record<string, unknown> {
  const map = new Map<string, unknown>()
  for (let pair = 0; pair < token.value; pair++) {
    const key = readKey(cursor, map, path)
    path.push(key)
    map.set(key, readValue(cursor, schemaOf(schema, key, path), path))
    path.pop()
  }
  if (schema.is === 'map') checkMissing(map, schema, path)
  return Object.fromEntries(map)
}

function schemaOf(schema: Schema, key: string, path: Path): Schema {
  if (schema.is === 'dictionary') return schema.of
  if (schema.is !== 'map') return ANY
  if (Object.hasOwn(schema.required, key)) return schema.required[key]
  if (Object.hasOwn(schema.optional, key)) return schema.optional[key]
  if (schema.rest === undefined) throw malformed(`${spell(path)} is unknown`)
  return schema.rest
}

function checkMissing(map: Map<string, unknown>, schema: MapSchema, path: Path): void {
  for (const key of Object.keys(schema.required)) {
    if (!map.has(key)) throw malformed(`${spell([...path, key])} is missing`)
  }
}

function buildString(cursor: Cursor, { token, schema, path }: Reading): string {
  const text = payload(cursor, token.value).toString()
  if (schema.is === 'name' && !schema.pattern.test(text)) {
    throw malformed(`${spell(path)} is ${quote(text)}, expected ${schema.pattern.source}`)
  }
  return text
}

function payload(cursor: Cursor, length: number): Buffer {
  const start = cursor.position
  cursor.position += length
  return cursor.bytes.subarray(start, cursor.position)
}

/** `open.parameters[3].shape[1]`; a key that is not a plain word is quoted. */
function spell(path: Path): string {
  return path.map((part, index) => spellPart(part, index === 0)).join('')
}

function spellPart(part: string | number, first: boolean): string {
  if (typeof part === 'number') return `[${part}]`
  if (/^\w{1,80}$/.test(part)) return first ? part : `.${part}`
  return `.${quote(part)}`
}
