/** Hand-made msgpack for tests, also such as no encoder would write. */

export const hex = (text: string) => Buffer.from(text.replace(/\s/g, ''), 'hex')

export const str = (text: string) => {
  const bytes = Buffer.from(text)
  return bytes.length < 32
    ? Buffer.concat([Buffer.from([0xa0 | bytes.length]), bytes])
    : Buffer.concat([Buffer.from([0xda, bytes.length >> 8, bytes.length & 0xff]), bytes])
}

/**
 * A map of the given keys and values: repeated keys stay repeated. A number, a text or a hex Buffer is encoded as
 * itself.
 */
export const raw = (...pairs: [string | Buffer, Value][]) =>
  Buffer.concat([
    Buffer.from([0x80 | pairs.length]),
    ...pairs.flatMap(([key, item]) => [typeof key === 'string' ? str(key) : key, value(item)]),
  ])

export const array = (...items: Value[]) => Buffer.concat([Buffer.from([0x90 | items.length]), ...items.map(value)])

export type Value = Buffer | string | number

export const NIL = hex('c0')
export const TRUE = hex('c3')
export const FLOAT_ONE = hex('cb 3ff0000000000000')
export const bin = (bytes: number) => Buffer.concat([hex('c6'), uint32(bytes), Buffer.alloc(bytes)])
export const uint32 = (number: number) => {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(number)
  return bytes
}

/** A `step`, a `gradient`, an `open` or its first parameter, with one key replaced. */
export const step = (key: string, item: Value) => raw(['type', 'step'], ['step', 1], [key, item])
export const gradient = (key: string, item: Value) => {
  const pairs: [string, Value][] = [
    ['parameter', 0],
    ['step', 1],
    ['offset', 0],
    ['data', bin(4)],
  ]
  return raw(['type', 'gradient'], ...pairs.map(([k, v]): [string, Value] => [k, k === key ? item : v]))
}
export const opening = (...pairs: [string, Value][]) => raw(['type', 'open'], ['protocol', 1], ['run', 'r'], ...pairs)
export const parameter = (...pairs: [string, Value][]) =>
  opening(['parameters', array(raw(['name', 'w'], ['shape', array(2, 2)], ['group', 'g'], ...pairs))])
export const nested = (depth: number) => Buffer.concat([Buffer.alloc(depth, 0x91), hex('01')])

function value(item: Value): Buffer {
  if (typeof item === 'string') return str(item)
  if (typeof item === 'number') return item < 0 ? Buffer.from([0x100 + item]) : Buffer.concat([hex('ce'), uint32(item)])
  return item
}
