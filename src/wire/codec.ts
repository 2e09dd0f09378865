import { ServiceError } from '../errors.js'
import { atOnce } from './at-once.js'
import {
  type ClientFrame,
  type GradientFrame,
  OPEN_BYTES,
  type OpenedFrame,
  OTHER_KEYS_BYTES,
  type ParameterDescription,
  PROTOCOL,
  type ServerFrame,
  STEP_BYTES,
  type UpdateFrame,
} from './frame.js'
import { CLIENT_FRAMES, PARAMETER_DESCRIPTION, SERVER_FRAMES } from './frame-schemas.js'
import { type Cursor, cursorOf, ITEMS_PER_YIELD, malformed, nextToken, scan, takeBytes } from './msgpack.js'
import { binHead, listHead, pack } from './pack.js'
import { type MapSchema, quote, readMessage } from './schema.js'

/** In how many bytes of a message `peekGradient` looks for a gradient's keys, which take at most 102 as msgpack. */
export const PEEK_BYTES = 1024

/**
 * Decodes one message of a client. `data` is a view of `bytes`. The reader is our own and strict: others take
 * duplicate keys and extensions in silence, and forget whether a number was sent as 1 or as 1.0.
 * @throws ServiceError FRAME_MALFORMED with the path of the key, FRAME_TOO_LARGE, PROTOCOL_UNSUPPORTED,
 *   HYPERPARAMETER_INVALID (a float where a hyperparameter counts something)
 */
export function decodeClientFrame(bytes: Uint8Array, limits: DecodeLimits): ClientFrame {
  return atOnce(decodingClientFrame(bytes, limits))
}

/** Frames that may name every parameter of a large model. */
const LISTS: ReadonlySet<string> = new Set(['step', 'gradients', 'end'])

/** `max_parameters`: an `open` with more is refused before any of them is looked at. */
export type DecodeLimits = { chunk_bytes: number; max_parameters?: number }

/**
 * Decodes as `decodeClientFrame` does, and yields from time to time: an `open` of a large model is 16 MiB of small
 * values.
 */
export function* decodingClientFrame(bytes: Uint8Array, limits: DecodeLimits): Generator<undefined, ClientFrame> {
  const most = Math.max(OPEN_BYTES, limits.chunk_bytes + OTHER_KEYS_BYTES)
  if (bytes.length > most) throw tooLarge('a message', bytes.length, most)
  const { cursor, entries, type, schema } = yield* recognize(bytes, CLIENT_FRAMES, (key, at, { cursor, entries }) => {
    // To walk over a list that is refused for its length would cost more than the refusal is worth.
    if (key !== 'parameters') return
    checkProtocol(cursor, entries)
    checkCount(cursor, at, limits.max_parameters)
  })
  if (type === 'open') {
    checkLength('open', bytes.length, OPEN_BYTES)
    checkProtocol(cursor, entries)
  } else {
    const dataBytes = type === 'gradient' ? binLength(cursor, entries.get('data')) : 0
    checkLength('gradient.data', dataBytes, limits.chunk_bytes)
    const most = LISTS.has(type) ? STEP_BYTES : OTHER_KEYS_BYTES
    checkLength(`${type} without its data`, bytes.length - dataBytes, most)
  }
  // The schema of this type has held every key and value, and the compiler holds the schema to the type.
  return (yield* readMessage(bytes, schema, type)) as ClientFrame
}

/**
 * Decodes one message of the service, for clients. Keys that this version does not know are passed on; a frame of a
 * type that it does not know is undefined.
 * @throws ServiceError FRAME_MALFORMED
 */
export function decodeServerFrame(bytes: Uint8Array): ServerFrame | undefined {
  const { name } = atOnce(reading(bytes))
  if (!isKey(name, SERVER_FRAMES)) return undefined
  return atOnce(readMessage(bytes, SERVER_FRAMES[name], name)) as ServerFrame
}

/** A gradient frame but for its data, which begins at byte `dataStart` of the message and has `dataLength` bytes. */
export type GradientHead = Omit<GradientFrame, 'type' | 'data'> & { dataStart: number; dataLength: number }

/**
 * Reads a gradient frame's keys from the first bytes of its message, so that `data` can be received straight into its
 * place. The caller has to check that the message has `dataStart + dataLength` bytes.
 * Returns 'more' where `head` ends before `data` begins. Returns undefined where `decodeClientFrame` has to read the
 * whole message: it is no gradient, or is not as it must be, and `decodeClientFrame` says why.
 */
export function peekGradient(head: Uint8Array): GradientHead | 'more' | undefined {
  const cursor = cursorOf(head.subarray(0, PEEK_BYTES))
  const found = readGradientHead(cursor)
  if (found !== undefined) return found
  return cursor.ended && head.length < PEEK_BYTES ? 'more' : undefined
}

/** Encodes a frame as it stands, keys that are undefined left out, and every float as a float64. */
export function encodeFrame(frame: Exclude<ClientFrame, GradientFrame> | ServerFrame): Buffer {
  return pack(frame, schemaOf(frame))
}

/**
 * Encodes `opened` with its parameters, one after the other, as its last key. Yields from time to time: of a large
 * model this is the one frame of the service that has many bytes.
 */
export function* encodingOpened(
  frame: Omit<OpenedFrame, 'parameters'>,
  parameters: Iterable<ParameterDescription>,
): Generator<undefined, Buffer> {
  const header = withOneMorePair(pack(frame, SERVER_FRAMES.opened))
  const list: Buffer[] = []
  for (const parameter of parameters) {
    list.push(pack(parameter, PARAMETER_DESCRIPTION))
    if (list.length % ITEMS_PER_YIELD === 0) yield
  }
  return Buffer.concat([header, PARAMETERS_KEY, listHead(list.length), ...list])
}

/** A gradient or update frame but for its `data`. */
export type DataHeader = Omit<GradientFrame, 'data'> | Omit<UpdateFrame, 'data'>

/**
 * Encodes a frame up to and including the bin header of `data`, its last key: the payload of `dataLength` bytes goes
 * after it as a fragment of its own, so no tensor is copied.
 */
export function encodeHeader(frame: DataHeader, dataLength: number): Buffer {
  return withOneMorePair(Buffer.concat([pack(frame, schemaOf(frame)), DATA_KEY, binHead(dataLength)]))
}

/** Counts one more pair in the map that the message is: msgpack has the count of up to 15 in the first byte. */
function withOneMorePair(message: Buffer): Buffer {
  /* c8 ignore next -- an `opened` with every key that there may be */
  if (message[0] === MOST_IN_FIRST_BYTE) return Buffer.concat([SIXTEEN_PAIRS, message.subarray(1)])
  message[0] += 1
  return message
}

/** Encodes header and payload into one message: a copy, for small tensors and tests. */
export function encodeWithData(frame: DataHeader, data: Uint8Array): Buffer {
  return Buffer.concat([encodeHeader(frame, data.length), data])
}

type Recognized<T> = { cursor: Cursor; entries: Map<string, number>; type: T; schema: MapSchema }

type Look = (key: string, at: number, scanned: { cursor: Cursor; entries: ReadonlyMap<string, number> }) => void

function* recognize<T extends string>(
  bytes: Uint8Array,
  table: Readonly<Record<T, MapSchema>>,
  look: Look,
): Generator<undefined, Recognized<T>> {
  const { cursor, entries, name } = yield* reading(bytes, look)
  if (!isKey(name, table)) throw malformed(`unknown frame type ${quote(name)}`)
  return { cursor, entries, type: name, schema: table[name] }
}

/** Finds where a message has its keys, and the name of its type. */
function* reading(
  bytes: Uint8Array,
  look?: Look,
): Generator<undefined, { cursor: Cursor; entries: Map<string, number>; name: string }> {
  const cursor = cursorOf(bytes)
  const entries = yield* scan(cursor, (key, at, entries) => look?.(key, at, { cursor, entries }))
  const at = entries.get('type')
  if (at === undefined) throw malformed('the frame has no type')
  cursor.position = at
  const name = readString(cursor)
  if (name === undefined) throw malformed('the type of the frame is not a string')
  return { cursor, entries, name }
}

function isKey<T extends string>(name: string, table: Readonly<Record<T, unknown>>): name is T {
  return Object.hasOwn(table, name)
}

/**
 * Checks the version of an `open` before any other key: another version may have other keys, and its client should be
 * told of the version and not of a key.
 */
function checkProtocol(cursor: Cursor, entries: ReadonlyMap<string, number>): void {
  const at = entries.get('protocol')
  if (at === undefined) return
  cursor.position = at
  const { kind, value } = nextToken(cursor)
  if (kind !== 'int' || value === PROTOCOL) return
  throw new ServiceError('PROTOCOL_UNSUPPORTED', `open.protocol is ${value}, this service speaks ${PROTOCOL}`)
}

/**
 * Refuses a message by the length of its list of parameters.
 */
function checkCount(cursor: Cursor, at: number, most = Number.POSITIVE_INFINITY): void {
  cursor.position = at
  const { kind, value } = nextToken(cursor)
  // A list that cannot be in what is left of the message is malformed, and found to be so at once.
  const isThere = value <= cursor.bytes.length - cursor.position
  if (kind !== 'list' || value <= most || !isThere) return
  throw new ServiceError('OVER_CAPACITY', `a run holds at most ${most} parameters, given are ${value}`)
}

/** The bytes of the bin at position `at`; 0 where there is no bin, which the schema refuses afterwards. */
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

function readGradientHead(cursor: Cursor): GradientHead | undefined {
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

const MOST_IN_FIRST_BYTE = 0x8f
const SIXTEEN_PAIRS = Buffer.of(0xde, 0, 16)
const PARAMETERS_KEY = Buffer.concat([Buffer.of(0xa0 | 'parameters'.length), Buffer.from('parameters')])
const DATA_KEY = Buffer.from([0xa4, 0x64, 0x61, 0x74, 0x61])

function schemaOf({ type }: ClientFrame | ServerFrame | DataHeader): MapSchema {
  return isKey(type, CLIENT_FRAMES) ? CLIENT_FRAMES[type] : SERVER_FRAMES[type]
}
