import { encodeHeader } from '../../../src/wire/codec.js'

/** The request of an upgrade, whole: what follows it is a WebSocket's. */
export const UPGRADE = [
  'GET /v1/stream HTTP/1.1',
  'Host: localhost',
  'Upgrade: websocket',
  'Connection: Upgrade',
  'Sec-WebSocket-Version: 13',
  'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==',
  '\r\n',
].join('\r\n')

/** The bytes of a WebSocket frame (RFC 6455, section 5.2). `first` has FIN, RSV and opcode; `mask` may be left out. */
export function rawFrame(first: number, payload: Uint8Array, mask?: Uint8Array): Buffer {
  const { length } = payload
  const form = length < 126 ? 0 : length < 65_536 ? 2 : 8
  const header = Buffer.alloc(2 + form)
  header[0] = first
  header[1] = (mask ? 0x80 : 0) | (form === 0 ? length : form === 2 ? 126 : 127)
  if (form === 2) header.writeUInt16BE(length, 2)
  if (form === 8) header.writeBigUInt64BE(BigInt(length), 2)
  const body = mask?.some((byte) => byte !== 0) ? payload.map((byte, i) => byte ^ mask[i & 3]!) : payload
  return Buffer.concat([header, mask ?? Buffer.alloc(0), body])
}

/** A gradient as one message, or as two fragments: the header and the data. */
export function rawGradient(
  parameter: number,
  data: Uint8Array,
  { mask, fragments = false, offset = 0 }: { mask?: Uint8Array; fragments?: boolean; offset?: number },
): Buffer {
  const header = encodeHeader({ type: 'gradient', parameter, step: 1, offset }, data.length)
  return fragments
    ? Buffer.concat([rawFrame(0x02, header, mask), rawFrame(0x80, data, mask)])
    : rawFrame(0x82, Buffer.concat([header, data]), mask)
}

/** Random bytes by a seed (xorshift32). */
export function randomBytes(length: number, seed: number): Uint8Array {
  let x = Math.imul(seed + 1, 2654435761)
  return Uint8Array.from({ length }, () => {
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    return x & 0xff
  })
}

/** Makes a socket that of a Node without the internal fields that InPlaceWebSocket uses. */
export function hideReadFields(socket: object): void {
  for (const symbol of Object.getOwnPropertySymbols(socket)) {
    if (symbol.description === 'kBuffer') Reflect.deleteProperty(socket, symbol)
  }
}
