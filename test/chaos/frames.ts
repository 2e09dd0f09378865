import { cursorOf, nextToken, takeBytes } from '../../src/wire/msgpack.js'

/** A piece of one direction of a connection: the HTTP upgrade, then WebSocket frames (RFC 6455, section 5.2). */
export type Piece = { kind: 'head'; bytes: Buffer } | Frame

/** A frame: `bytes` as it travels, `payload` without the head and the mask. */
export type Frame = { kind: 'frame'; bytes: Buffer; opcode: number; fin: boolean; payload: Buffer }

/** The keys of a message that its first bytes may say. */
export type Label = { type: string; parameter?: number; step?: number; offset?: number }

const HEAD_END = '\r\n\r\n'
const CONTROL = 8
const MASK_BYTES = 4

/** Cuts one direction of a WebSocket connection into its frames. */
export class FrameSplitter {
  #rest: Buffer = Buffer.alloc(0)
  #upgraded = false

  /** Bytes of a piece that is not whole yet. */
  get rest(): Buffer {
    return this.#rest
  }

  /** Takes the bytes of a read and returns the pieces that they complete. */
  push(bytes: Buffer): Piece[] {
    this.#rest = Buffer.concat([this.#rest, bytes])
    const pieces: Piece[] = []
    for (let piece = this.#next(); piece; piece = this.#next()) {
      pieces.push(piece)
      this.#rest = this.#rest.subarray(piece.bytes.length)
    }
    return pieces
  }

  #next(): Piece | undefined {
    if (this.#upgraded) return readFrame(this.#rest)
    const end = this.#rest.indexOf(HEAD_END)
    if (end < 0) return undefined
    this.#upgraded = true
    return { kind: 'head', bytes: this.#rest.subarray(0, end + HEAD_END.length) }
  }
}

/** The frame at the beginning of `bytes`; undefined where it is not whole. */
function readFrame(bytes: Buffer): Frame | undefined {
  if (bytes.length < 2) return undefined
  const short = bytes[1] & 0x7f
  const lengthBytes = short === 127 ? 8 : short === 126 ? 2 : 0
  const mask = 2 + lengthBytes
  const start = mask + (bytes[1] & 0x80 ? MASK_BYTES : 0)
  if (bytes.length < start) return undefined
  const length =
    lengthBytes === 8 ? Number(bytes.readBigUInt64BE(2)) : lengthBytes === 2 ? bytes.readUInt16BE(2) : short
  const end = start + length
  if (bytes.length < end) return undefined
  const key = bytes.subarray(mask, start)
  const payload = Buffer.from(bytes.subarray(start, end))
  if (key.length > 0) for (let i = 0; i < length; i++) payload[i] ^= key[i % MASK_BYTES]
  return {
    kind: 'frame',
    bytes: bytes.subarray(0, end),
    opcode: bytes[0] & 0x0f,
    fin: (bytes[0] & 0x80) !== 0,
    payload,
  }
}

export function isControl({ opcode }: Frame): boolean {
  return opcode >= CONTROL
}

/** The frame with only the first `length` bytes of its payload: its head fits them, but its message is cut off. */
export function shorten({ bytes, payload }: Frame, length: number): Buffer {
  const masked = bytes[1] & 0x80
  const key = masked ? bytes.subarray(bytes.length - payload.length - MASK_BYTES, bytes.length - payload.length) : []
  const extended = Buffer.alloc(length > 0xffff ? 8 : length > 125 ? 2 : 0)
  if (extended.length === 8) extended.writeBigUInt64BE(BigInt(length))
  if (extended.length === 2) extended.writeUInt16BE(length)
  const short = [length, 126, 127][Math.ceil(extended.length / 4)]
  const body = bytes.subarray(bytes.length - payload.length).subarray(0, length)
  return Buffer.concat([Buffer.from([bytes[0], masked | short]), extended, Buffer.from(key), body])
}

/** Reads a message's label from its first bytes, as far as they go; undefined where they say nothing. */
export function labelOf(payload: Buffer): Label | undefined {
  const cursor = cursorOf(payload)
  const map = nextToken(cursor)
  const found: Record<string, string | number> = {}
  for (let pair = 0; map.kind === 'map' && pair < map.value; pair++) {
    const key = takeBytes(cursor, nextToken(cursor).value)
    const { kind, value } = nextToken(cursor)
    // Our encoders write the keys of the label before the first list, map or bin.
    if (key === undefined || (kind !== 'int' && kind !== 'string')) break
    found[String(key)] = kind === 'int' ? value : String(takeBytes(cursor, value))
  }
  const { type, parameter, step, offset } = found
  if (typeof type !== 'string') return undefined
  const number = (name: string, value: string | number | undefined) => typeof value === 'number' && { [name]: value }
  return { type, ...number('parameter', parameter), ...number('step', step), ...number('offset', offset) }
}
