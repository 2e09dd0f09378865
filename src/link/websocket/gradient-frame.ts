import { type GradientHead, PEEK_BYTES, peekGradient } from '../../wire/codec.js'

/** Payloads below this are not worth a path of their own. */
export const IN_PLACE_BYTES = 65_536

/** A message that is cut into many fragments has larger ones. */
const SMALL_BYTES = 1024

/** No more bytes than this are ever needed to decide about a frame: two frame headers and what may be peeked at. */
export const UNDECIDED_BYTES = 2 * 14 + PEEK_BYTES

/**
 * Tensor bytes from `start` to `end`, counted from the message's first byte; `key` unmasks the byte at `start` with
 * its first byte.
 */
export type GradientPayload = { kind: 'gradient'; head: GradientHead; start: number; end: number; key: Uint8Array }

export type Recognized =
  | { kind: 'more' }
  /** A whole ping or pong of `length` bytes, header included, as it must be. */
  | { kind: 'control'; isPing: boolean; length: number }
  /**
   * A frame of `length` bytes, header included; `fragmented` says whether a message goes on after it, `isSmall` whether
   * it is a fragment of less than SMALL_BYTES. The first and the last fragment are none, however small: a gradient's
   * header and its data are two.
   */
  | { kind: 'ordinary'; length: number; fragmented: boolean; isSmall: boolean }
  | GradientPayload

/**
 * Decides about the WebSocket frame (RFC 6455, section 5.2) at the start of `bytes`, before the rest of it is here. A
 * gradient is recognized when it is one binary frame, or its header is one fragment and its data exactly the second
 * and last. It must be masked, at least IN_PLACE_BYTES and at most `maxPayload` (0: no limit) long, and must not need
 * any rule of the protocol enforced: everything else is ordinary, right or wrong.
 */
export function recognize(bytes: Buffer, fragmented: boolean, maxPayload: number): Recognized {
  const frame = readFrameHeader(bytes, 0)
  if (frame === undefined) return { kind: 'more' }
  if (isControl(frame)) return readControl(bytes, frame)
  const found = fragmented ? undefined : readGradient(bytes, frame, maxPayload)
  if (found) return found
  const length = frame.start + frame.length
  const isSmall = fragmented && goesOn(frame.first, fragmented) && frame.length < SMALL_BYTES
  return { kind: 'ordinary', length, fragmented: goesOn(frame.first, fragmented), isSmall }
}

type FrameHeader = { first: number; masked: boolean; start: number; length: number }

const PING = 0x89
const PONG = 0x8a
const MOST_CONTROL_BYTES = 125
const FINAL_BINARY = 0x82
const FIRST_BINARY = 0x02
const FINAL_CONTINUATION = 0x80

function readFrameHeader(bytes: Buffer, at: number): FrameHeader | undefined {
  const available = bytes.length - at
  if (available < 2) return undefined
  const second = bytes.readUInt8(at + 1)
  const short = second & 0x7f
  const lengthBytes = short < 126 ? 0 : short === 126 ? 2 : 8
  const masked = second >= 0x80
  const headerBytes = 2 + lengthBytes + (masked ? 4 : 0)
  if (available < headerBytes) return undefined
  const length = lengthBytes === 0 ? short : readLength(bytes, at + 2, lengthBytes)
  return { first: bytes.readUInt8(at), masked, start: at + headerBytes, length }
}

function readLength(bytes: Buffer, at: number, lengthBytes: 2 | 8): number {
  return lengthBytes === 2 ? bytes.readUInt16BE(at) : Number(bytes.readBigUInt64BE(at))
}

function isControl({ first, masked, length }: FrameHeader): boolean {
  return (first === PING || first === PONG) && masked && length <= MOST_CONTROL_BYTES
}

function readControl(bytes: Buffer, { first, start, length }: FrameHeader): Recognized {
  const end = start + length
  return bytes.length < end ? { kind: 'more' } : { kind: 'control', isPing: first === PING, length: end }
}

function goesOn(first: number, fragmented: boolean): boolean {
  const isControl = (first & 0x08) !== 0
  return isControl ? fragmented : (first & 0x80) === 0
}

function readGradient(bytes: Buffer, frame: FrameHeader, maxPayload: number): Recognized | undefined {
  if (!frame.masked) return undefined
  if (frame.first === FINAL_BINARY) return readWhole(bytes, frame, maxPayload)
  return frame.first === FIRST_BINARY ? readFragments(bytes, frame, maxPayload) : undefined
}

function readWhole(bytes: Buffer, frame: FrameHeader, maxPayload: number): Recognized | undefined {
  if (frame.length < IN_PLACE_BYTES || exceeds(frame.length, maxPayload)) return undefined
  const head = peekGradient(unmasked(bytes, frame))
  if (head === 'more') return { kind: 'more' }
  if (head === undefined || head.dataStart + head.dataLength !== frame.length) return undefined
  return payload(bytes, frame, head, head.dataStart)
}

function readFragments(bytes: Buffer, frame: FrameHeader, maxPayload: number): Recognized | undefined {
  if (frame.length > PEEK_BYTES) return undefined
  if (bytes.length < frame.start + frame.length) return { kind: 'more' }
  const head = peekGradient(unmasked(bytes, frame))
  if (head === 'more' || head?.dataStart !== frame.length || head.dataLength < IN_PLACE_BYTES) return undefined
  if (exceeds(head.dataStart + head.dataLength, maxPayload)) return undefined
  const data = readFrameHeader(bytes, frame.start + frame.length)
  if (data === undefined) return { kind: 'more' }
  const fits = data.first === FINAL_CONTINUATION && data.masked && data.length === head.dataLength
  return fits ? payload(bytes, data, head, 0) : undefined
}

function exceeds(length: number, maxPayload: number): boolean {
  return maxPayload > 0 && length > maxPayload
}

function payload(bytes: Buffer, frame: FrameHeader, head: GradientHead, skip: number): GradientPayload {
  const key = rotated(bytes.subarray(frame.start - 4, frame.start), skip)
  return { kind: 'gradient', head, start: frame.start + skip, end: frame.start + frame.length, key }
}

/** The key for bytes that begin `position` bytes later; a copy. */
export function rotated(key: Uint8Array, position: number): Uint8Array {
  const by = position & 3
  return Buffer.concat([key.subarray(by), key.subarray(0, by)])
}

/** A readable copy of what of the payload is here and may be peeked at; the bytes themselves stay as they came. */
function unmasked(bytes: Buffer, frame: FrameHeader): Uint8Array {
  const end = frame.start + Math.min(frame.length, PEEK_BYTES)
  const masked = Uint8Array.from(bytes.subarray(frame.start, end))
  return masked.map((byte, i) => byte ^ bytes.readUInt8(frame.start - 4 + (i & 3)))
}
