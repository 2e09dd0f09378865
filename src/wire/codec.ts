import { ServiceError } from '../errors.js'
import {
  CLIENT_FRAMES,
  type ClientFrame,
  type GradientFrame,
  OPEN_BYTES,
  OTHER_KEYS_BYTES,
  PROTOCOL,
  SERVER_FRAMES,
  type ServerFrame,
  STEP_BYTES,
  type UpdateFrame,
} from './frame.js'
import { type Cursor, cursorOf, malformed, nextToken, scan, takeBytes } from './msgpack.js'
import { binHead, pack } from './pack.js'
import { type MapSchema, quote, readMessage } from './schema.js'

/** A gradient header is at most 102 bytes in its longest spelling; more than this is not looked at. */
export const PEEK_BYTES = 1024

/**
 * Decodes one message of a client. `data` is a view of `bytes`. The reader is our own and strict: others take duplicate keys and
 * extensions in silence, and forget whether a number was sent as 1 or as 1.0.
 * @throws ServiceError FRAME_MALFORMED with the path of the key, FRAME_TOO_LARGE, PROTOCOL_UNSUPPORTED,
 *   HYPERPARAMETER_INVALID (a float where a hyperparameter counts something)
 */
export function decodeClientFrame(bytes: Uint8Array, limits: { chunk_bytes: number }): ClientFrame {
  const most = Math.max(OPEN_BYTES, limits.chunk_bytes + OTHER_KEYS_BYTES)
  if (bytes.length > most) throw tooLarge('a message', bytes.length, most)
  const { cursor, entries, type, schema } = recognize(bytes, CLIENT_FRAMES)
  if (type === 'open') {
    checkLength('open', bytes.length, OPEN_BYTES)
    checkProtocol(cursor, entries)
  } else {
    const dataBytes = type === 'gradient' ? binLength(cursor, entries.get('data')) : 0
    checkLength('gradient.data', dataBytes, limits.chunk_bytes)
    checkLength(`${type} without its data`, bytes.length - dataBytes, type === 'step' ? STEP_BYTES : OTHER_KEYS_BYTES)
  }
  // The schema of this type has held every key and value, and the compiler holds the schema to the type.
  return readMessage(bytes, schema, type) as ClientFrame
}

/**
 * Decodes one message of the service, for clients. Keys that this version does not know are passed on.
 * @throws ServiceError FRAME_MALFORMED
 */
export function decodeServerFrame(bytes: Uint8Array): ServerFrame {
  const { type, schema } = recognize(bytes, SERVER_FRAMES)
  return readMessage(bytes, schema, type) as ServerFrame
}

export type GradientHead = Omit<GradientFrame, 'type' | 'data'> & { dataStart: number; dataLength: number }

/**
 * Reads a gradient's keys from the first bytes of a message, so that its payload can be received in place: `data` begins
 * at byte `dataStart` and is declared with `dataLength` bytes; that both sum to the message's length is for the caller to
 * check. 'more': these bytes are not enough yet. undefined: this message must go the ordinary way, which also
 * finds the words for what is wrong with it.
 */
export function peekGradient(head: Uint8Array): GradientHead | 'more' | undefined {
  const cursor = cursorOf(head.subarray(0, PEEK_BYTES))
  const found = readHead(cursor)
  if (found !== undefined) return found
  return cursor.ended && head.length < PEEK_BYTES ? 'more' : undefined
}

/** Encodes a frame as it stands, keys that are undefined left out, and every float as a float64. */
export function encodeFrame(frame: Exclude<ClientFrame, GradientFrame> | ServerFrame): Buffer {
  return pack(frame, schemaOf(frame))
}

/** A frame with tensor bytes, without them. */
export type DataHeader = Omit<GradientFrame, 'data'> | Omit<UpdateFrame, 'data'>

/**
 * Encodes a frame up to and including the bin header of `data`, its last key: the payload of `dataLength` bytes goes
 * after it as a fragment of its own, so no tensor is copied.
 */
export function encodeHeader(frame: DataHeader, dataLength: number): Buffer {
  const header = Buffer.concat([pack(frame, schemaOf(frame)), DATA_KEY, binHead(dataLength)])
  // One more pair in the map; no frame reaches the 15 at which the count would leave the first byte.
  header[0] += 1
  return header
}

/** Encodes header and payload into one message: a copy, for small tensors and tests. */
export function encodeWithData(frame: DataHeader, data: Uint8Array): Buffer {
  return Buffer.concat([encodeHeader(frame, data.length), data])
}

type Recognized<T> = { cursor: Cursor; entries: Map<string, number>; type: T; schema: MapSchema }

function recognize<T extends string>(bytes: Uint8Array, table: Readonly<Record<T, MapSchema>>): Recognized<T> {
  const cursor = cursorOf(bytes)
  const entries = scan(cursor)
  const at = entries.get('type')
  if (at === undefined) throw malformed('the frame has no type')
  cursor.position = at
  const name = readString(cursor)
  if (name === undefined) throw malformed('the type of the frame is not a string')
  if (!isKey(name, table)) throw malformed(`unknown frame type ${quote(name)}`)
  return { cursor, entries, type: name, schema: table[name] }
}

function isKey<T extends string>(name: string, table: Readonly<Record<T, unknown>>): name is T {
  return Object.hasOwn(table, name)
}

/** Before anything else in `open`: another version may have other keys, and its client should hear about the version. */
function checkProtocol(cursor: Cursor, entries: Map<string, number>): void {
  const at = entries.get('protocol')
  if (at === undefined) return
  cursor.position = at
  const { kind, value } = nextToken(cursor)
  if (kind !== 'int' || value === PROTOCOL) return
  throw new ServiceError('PROTOCOL_UNSUPPORTED', `open.protocol is ${value}, this service speaks ${PROTOCOL}`)
}

/** The length of the bin at this position; 0 for what is absent or no bin, which the schema refuses afterwards. */
function binLength(cursor: Cursor, at: number | undefined): number {
  if (at === undefined) return 0
  cursor.position = at
  const { kind, value } = nextToken(cursor)
  return kind === 'bin' ? value : 0
}

function checkLength(what: string, length: number, most: number): void {
  if (length > most) throw tooLarge(what, length, most)
}

function tooLarge(what: string, length: number, most: number): ServiceError {
  return new ServiceError('FRAME_TOO_LARGE', `${what} has ${length} bytes, at most ${most} are allowed`)
}

function readHead(cursor: Cursor): GradientHead | undefined {
  const map = nextToken(cursor)
  if (map.kind !== 'map' || map.value !== 5) return undefined
  const found: Record<string, number> = {}
  for (let pair = 0; pair < 4; pair++) {
    const key = readString(cursor)
    if (key === undefined) return undefined
    const value = key === 'type' ? readType(cursor) : readUint(cursor)
    if (value === undefined) return undefined
    found[key] = value
  }
  const { type, parameter, step, offset } = found
  if (type === undefined || parameter === undefined || step === undefined || offset === undefined) return undefined
  if (readString(cursor) !== 'data') return undefined
  const data = nextToken(cursor)
  return data.kind === 'bin'
    ? { parameter, step, offset, dataStart: cursor.position, dataLength: data.value }
    : undefined
}

function readType(cursor: Cursor): number | undefined {
  return readString(cursor) === 'gradient' ? 1 : undefined
}

function readUint(cursor: Cursor): number | undefined {
  const { kind, value } = nextToken(cursor)
  return kind === 'int' && value >= 0 ? value : undefined
}

function readString(cursor: Cursor): string | undefined {
  const { kind, value } = nextToken(cursor)
  return kind === 'string' ? takeBytes(cursor, value)?.toString() : undefined
}

const DATA_KEY = Buffer.from([0xa4, 0x64, 0x61, 0x74, 0x61])

function schemaOf({ type }: ClientFrame | ServerFrame | DataHeader): MapSchema {
  return isKey(type, CLIENT_FRAMES) ? CLIENT_FRAMES[type] : SERVER_FRAMES[type]
}
