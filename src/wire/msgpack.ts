import { isUtf8 } from 'node:buffer'
import { ServiceError } from '../errors.js'

/** Most maps and lists inside each other. `open` needs five: frame, groups, group, list of triples, triple. */
export const MAX_DEPTH = 8

/** Most keys and values of one frame; an `open` of 100 000 parameters has fewer. Bounds what a frame costs to read. */
export const MAX_VALUES = 2 ** 21

/** After so many items of a long list or map the reader yields: they take a fraction of a millisecond. */
export const ITEMS_PER_YIELD = 256

/** A reading position in a message. `fault` says why the last token is of kind 'none'; `ended`: bytes were lacking. */
export type Cursor = { readonly bytes: Buffer; position: number; fault: string; ended: boolean }

/**
 * The head of one msgpack value. `value` is the number (`int`, `float`; 0 or 1 for `bool`), the count of items
 * (`list`) or of pairs (`map`), or the byte length of the payload that follows (`string`, `bin`).
 */
export type Token = { readonly kind: Kind; readonly value: number }
export type Kind = 'map' | 'list' | 'string' | 'bin' | 'int' | 'float' | 'bool' | 'nil' | 'none'

export function cursorOf(bytes: Uint8Array): Cursor {
  return {
    bytes: Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength),
    position: 0,
    fault: '',
    ended: false,
  }
}

/** Reads the next head and moves the cursor behind it. Never throws: it returns a token of kind 'none' instead. */
export function nextToken(cursor: Cursor): Token {
  const { bytes, position } = cursor
  if (position >= bytes.length) return short(cursor)
  const byte = bytes.readUInt8(position)
  cursor.position += 1
  if (byte <= 0x7f) return { kind: 'int', value: byte }
  if (byte <= 0x8f) return { kind: 'map', value: byte & 0x0f }
  if (byte <= 0x9f) return { kind: 'list', value: byte & 0x0f }
  if (byte <= 0xbf) return { kind: 'string', value: byte & 0x1f }
  if (byte >= 0xe0) return { kind: 'int', value: byte - 0x100 }
  return longToken(cursor, byte)
}

/** Takes the payload of a string or bin: a view, no copy; undefined where fewer bytes are left. */
export function takeBytes(cursor: Cursor, length: number): Buffer | undefined {
  const end = cursor.position + length
  if (end > cursor.bytes.length) {
    short(cursor)
    return undefined
  }
  const payload = cursor.bytes.subarray(cursor.position, end)
  cursor.position = end
  return payload
}

/**
 * Walks over a whole message without building anything and returns where each value of its map begins. After it every
 * length fits, every map key is UTF-8 text, nothing follows the map, and depth and count are within their caps.
 * Yields from time to time, so that a long message can be walked over in several turns of the event loop. `look` may
 * refuse the message at each of its keys, before the value at `at` is walked over; `entries` has the keys so far.
 * @throws ServiceError FRAME_MALFORMED, FRAME_TOO_LARGE (more than MAX_VALUES keys and values)
 */
export function* scan(
  cursor: Cursor,
  look: (key: string, at: number, entries: ReadonlyMap<string, number>) => void,
): Generator<undefined, Map<string, number>> {
  const entries = new Map<string, number>()
  const map = nextToken(cursor)
  if (map.kind !== 'map') throw malformed(notAMap(cursor, map))
  const walk: Walk = { cursor, values: 0 }
  for (let pair = 0; pair < map.value; pair++) {
    const key = skipKey(walk)
    const at = cursor.position
    entries.set(key, at)
    look(key, at, entries)
    cursor.position = at
    yield* skipLongValue(walk)
  }
  const rest = cursor.bytes.length - cursor.position
  if (rest > 0) throw malformed(`${rest} bytes after the map, which ends at byte ${cursor.position}`)
  return entries
}

export function malformed(message: string): ServiceError {
  return new ServiceError('FRAME_MALFORMED', message)
}

const [BRACE, BRACKET] = [0x7b, 0x5b]

function notAMap({ bytes, fault }: Cursor, { kind }: Token): string {
  const isJson = [BRACE, BRACKET].includes(bytes[0])
  if (isJson) return 'the message is JSON, expected is one msgpack map: pack the same keys with msgpack'
  return fault || `a message is one msgpack map, this one is a ${kind}`
}

type Walk = { readonly cursor: Cursor; values: number }

function skipKey(walk: Walk): string {
  const { cursor } = walk
  const at = cursor.position
  const token = countedToken(walk)
  if (token.kind !== 'string') throw malformed(`the map key at byte ${at} is a ${token.kind}, expected a string`)
  return skipPayload(cursor, token).toString()
}

/** A value of the message's own map: only there are lists long enough to be walked over in several turns. */
function* skipLongValue(walk: Walk): Generator<undefined, void> {
  const token = skipHead(walk, 1)
  for (let item = 0; item < itemsOf(token); item++) {
    if (item % ITEMS_PER_YIELD === ITEMS_PER_YIELD - 1) yield
    if (token.kind === 'map') skipKey(walk)
    skipValue(walk, 2)
  }
}

function skipValue(walk: Walk, depth: number): void {
  const token = skipHead(walk, depth)
  for (let item = 0; item < itemsOf(token); item++) {
    if (token.kind === 'map') skipKey(walk)
    skipValue(walk, depth + 1)
  }
}

/** Walks over a value, or of a list or map over its head alone. */
function skipHead(walk: Walk, depth: number): Token {
  const { cursor } = walk
  const at = cursor.position
  const token = countedToken(walk)
  if (token.kind === 'string' || token.kind === 'bin') skipPayload(cursor, token)
  if (token.kind !== 'list' && token.kind !== 'map') return token
  if (depth === MAX_DEPTH) throw malformed(`the ${token.kind} at byte ${at} is nested deeper than ${MAX_DEPTH}`)
  const least = token.kind === 'map' ? 2 * token.value : token.value
  const left = cursor.bytes.length - cursor.position
  if (least > left) throw malformed(`the ${token.kind} at byte ${at} declares ${token.value} items in ${left} bytes`)
  return token
}

function itemsOf({ kind, value }: Token): number {
  return kind === 'list' || kind === 'map' ? value : 0
}

function countedToken(walk: Walk): Token {
  walk.values += 1
  if (walk.values > MAX_VALUES) {
    throw new ServiceError('FRAME_TOO_LARGE', `the frame has more than ${MAX_VALUES} keys and values`)
  }
  const token = nextToken(walk.cursor)
  if (token.kind === 'none') throw malformed(walk.cursor.fault)
  return token
}

function skipPayload(cursor: Cursor, token: Token): Buffer {
  const at = cursor.position
  const payload = takeBytes(cursor, token.value)
  if (payload === undefined) throw malformed(cursor.fault)
  if (token.kind === 'string' && !isUtf8(payload)) throw malformed(`the string at byte ${at} is not UTF-8`)
  return payload
}

type Form = { kind: Kind; width: number; read: (bytes: Buffer, at: number) => number }

const u8 = (bytes: Buffer, at: number) => bytes.readUInt8(at)
const u16 = (bytes: Buffer, at: number) => bytes.readUInt16BE(at)
const u32 = (bytes: Buffer, at: number) => bytes.readUInt32BE(at)

/**
 * The type bytes from 0xc0 to 0xdf that a frame may hold (msgpack specification, "Formats"). The others of that range
 * are extensions and the unused 0xc1.
 */
const FORMS: Partial<Record<number, Form>> = {
  192: { kind: 'nil', width: 0, read: () => 0 },
  194: { kind: 'bool', width: 0, read: () => 0 },
  195: { kind: 'bool', width: 0, read: () => 1 },
  196: { kind: 'bin', width: 1, read: u8 },
  197: { kind: 'bin', width: 2, read: u16 },
  198: { kind: 'bin', width: 4, read: u32 },
  202: { kind: 'float', width: 4, read: (bytes, at) => bytes.readFloatBE(at) },
  203: { kind: 'float', width: 8, read: (bytes, at) => bytes.readDoubleBE(at) },
  204: { kind: 'int', width: 1, read: u8 },
  205: { kind: 'int', width: 2, read: u16 },
  206: { kind: 'int', width: 4, read: u32 },
  207: { kind: 'int', width: 8, read: (bytes, at) => Number(bytes.readBigUInt64BE(at)) },
  208: { kind: 'int', width: 1, read: (bytes, at) => bytes.readInt8(at) },
  209: { kind: 'int', width: 2, read: (bytes, at) => bytes.readInt16BE(at) },
  210: { kind: 'int', width: 4, read: (bytes, at) => bytes.readInt32BE(at) },
  211: { kind: 'int', width: 8, read: (bytes, at) => Number(bytes.readBigInt64BE(at)) },
  217: { kind: 'string', width: 1, read: u8 },
  218: { kind: 'string', width: 2, read: u16 },
  219: { kind: 'string', width: 4, read: u32 },
  220: { kind: 'list', width: 2, read: u16 },
  221: { kind: 'list', width: 4, read: u32 },
  222: { kind: 'map', width: 2, read: u16 },
  223: { kind: 'map', width: 4, read: u32 },
}

function longToken(cursor: Cursor, byte: number): Token {
  const { bytes, position } = cursor
  const form = FORMS[byte]
  if (form === undefined) {
    const what = `type byte 0x${byte.toString(16)} at byte ${position - 1}`
    return none(cursor, `${what} is not allowed: no frame has extension types, such as timestamps`)
  }
  if (position + form.width > bytes.length) return short(cursor)
  const value = form.read(bytes, position)
  cursor.position += form.width
  // Beyond 2^53 - 1 a double no longer tells neighbouring integers apart.
  if (form.kind === 'int' && !Number.isSafeInteger(value)) {
    return none(cursor, `the integer at byte ${position - 1} is beyond 2^53 - 1`)
  }
  return { kind: form.kind, value }
}

function short(cursor: Cursor): Token {
  cursor.ended = true
  return none(cursor, `the message ends at byte ${cursor.bytes.length}, in the middle of a value`)
}

function none(cursor: Cursor, fault: string): Token {
  cursor.fault = fault
  return { kind: 'none', value: 0 }
}
