import { INTEGER_HYPERPARAMETERS, type MapSchema, type Schema } from './schema.js'

/**
 * Encodes a frame as msgpack, keys that are undefined left out. What a number becomes is its schema's to say: where a
 * float is meant it is a float64, whole or not, as typed decoders read nothing else there. Where any value may stand,
 * a whole number is an integer.
 */
export function pack(frame: object, schema: MapSchema): Buffer {
  const writer = new Writer()
  writeMap(writer, frame, { schema, key: '' })
  return writer.take()
}

const ANY: Schema = { is: 'any' }

/** What a value must be, and the key that it stands under. */
type Expected = { schema: Schema; key: string }

const FIRST_BYTES = 256

/** Bytes that grow. */
class Writer {
  #bytes = Buffer.allocUnsafe(FIRST_BYTES)
  #length = 0

  take(): Buffer {
    return this.#bytes.subarray(0, this.#length)
  }

  /** Appends one byte and, behind it, a number that `write` puts there. */
  head(byte: number, width = 0, write?: (bytes: Buffer, at: number) => void): void {
    const at = this.#grow(1 + width)
    this.#bytes[at] = byte
    write?.(this.#bytes, at + 1)
  }

  /** Appends one byte and, behind it, a whole number of `width` bytes. */
  count(byte: number, width: number, value: number): void {
    const at = this.#grow(1 + width)
    this.#bytes[at] = byte
    this.#bytes.writeUIntBE(value, at + 1, width)
  }

  text(value: string, length: number): void {
    const at = this.#grow(length)
    this.#bytes.write(value, at)
  }

  bytes(value: Uint8Array): void {
    const at = this.#grow(value.length)
    this.#bytes.set(value, at)
  }

  #grow(count: number): number {
    const at = this.#length
    this.#length += count
    if (this.#length > this.#bytes.length) {
      const larger = Buffer.allocUnsafe(Math.max(this.#length, 2 * this.#bytes.length))
      this.#bytes.copy(larger, 0, 0, at)
      this.#bytes = larger
    }
    return at
  }
}

function writeValue(writer: Writer, value: unknown, expected: Expected): void {
  if (typeof value === 'number') return writeNumber(writer, value, expected)
  if (typeof value === 'string') return writeText(writer, value)
  if (typeof value === 'boolean') return writer.head(value ? 0xc3 : 0xc2)
  if (Array.isArray(value)) return writeList(writer, value, expected)
  if (ArrayBuffer.isView(value)) return writeBin(writer, value)
  if (typeof value === 'object' && value !== null) return writeMap(writer, value, expected)
  writer.head(0xc0)
}

function writeNumber(writer: Writer, value: number, { schema, key }: Expected): void {
  const isFloat = schema.is === 'float' || (schema.is === 'hyperparameter' && !INTEGER_HYPERPARAMETERS.includes(key))
  if (isFloat || !Number.isSafeInteger(value) || Object.is(value, -0)) return writeFloat(writer, value)
  if (value >= 0) return writeCount(writer, value)
  writeNegative(writer, value)
}

function writeFloat(writer: Writer, value: number): void {
  writer.head(0xcb, 8, (bytes, at) => bytes.writeDoubleBE(value, at))
}

function writeNegative(writer: Writer, value: number): void {
  if (value >= -0x20) return writer.head(0x100 + value)
  if (value >= -0x80) return writer.head(0xd0, 1, (bytes, at) => bytes.writeInt8(value, at))
  if (value >= -0x8000) return writer.head(0xd1, 2, (bytes, at) => bytes.writeInt16BE(value, at))
  if (value >= -0x80000000) return writer.head(0xd2, 4, (bytes, at) => bytes.writeInt32BE(value, at))
  writer.head(0xd3, 8, (bytes, at) => bytes.writeBigInt64BE(BigInt(value), at))
}

function writeCount(writer: Writer, value: number): void {
  if (value < 0x80) return writer.head(value)
  if (value > 0xffffffff) return writeBigCount(writer, BigInt(value))
  writeLength(writer, value, COUNT)
}

function writeBigCount(writer: Writer, value: bigint): void {
  writer.head(0xcf, 8, (bytes, at) => bytes.writeBigUInt64BE(value, at))
}

function writeText(writer: Writer, value: string): void {
  const length = Buffer.byteLength(value)
  if (length < 0x20) writer.head(0xa0 + length)
  else writeLength(writer, length, TEXT)
  writer.text(value, length)
}

function writeBin(writer: Writer, { buffer, byteOffset, byteLength }: ArrayBufferView): void {
  writeBinHead(writer, byteLength)
  writer.bytes(new Uint8Array(buffer, byteOffset, byteLength))
}

function writeBinHead(writer: Writer, length: number): void {
  writeLength(writer, length, BIN)
}

/** The head of a bin of so many bytes, which follow. */
export function binHead(length: number): Buffer {
  const writer = new Writer()
  writeBinHead(writer, length)
  return writer.take()
}

/** The head of a list of so many items, which follow. */
export function listHead(items: number): Buffer {
  const writer = new Writer()
  writeListHead(writer, items)
  return writer.take()
}

function writeListHead(writer: Writer, items: number): void {
  if (items < 0x10) writer.head(0x90 + items)
  else writeLength(writer, items, LIST)
}

function writeList(writer: Writer, items: readonly unknown[], { schema, key }: Expected): void {
  writeListHead(writer, items.length)
  // A list of numbers under a hyperparameter is of its kind: betas, coefficients.
  const of = schema.is === 'list' ? schema.of : schema.is === 'hyperparameter' ? schema : ANY
  const expected = { schema: of, key }
  for (const item of items) writeValue(writer, item, expected)
}

function writeMap(writer: Writer, map: object, { schema }: Expected): void {
  const present = Object.entries(map).filter(([, value]) => value !== undefined)
  if (present.length < 0x10) writer.head(0x80 + present.length)
  else writeLength(writer, present.length, MAP)
  for (const [key, value] of present) {
    writeText(writer, key)
    writeValue(writer, value, { schema: schemaAt(schema, key), key })
  }
}

function schemaAt(schema: Schema, key: string): Schema {
  if (schema.is === 'dictionary') return schema.of
  if (schema.is !== 'map') return ANY
  if (Object.hasOwn(schema.required, key)) return schema.required[key]
  return Object.hasOwn(schema.optional, key) ? schema.optional[key] : (schema.rest ?? ANY)
}

/** Numbers by their width in bytes; each width has a type byte of its own, one after the other from `byte` on. */
type Widths = { readonly byte: number; readonly widths: readonly (1 | 2 | 4)[] }

const COUNT: Widths = { byte: 0xcc, widths: [1, 2, 4] }
const TEXT: Widths = { byte: 0xd9, widths: [1, 2, 4] }
const BIN: Widths = { byte: 0xc4, widths: [1, 2, 4] }
const LIST: Widths = { byte: 0xdc, widths: [2, 4] }
const MAP: Widths = { byte: 0xde, widths: [2, 4] }

/** A number in the narrowest of the widths that holds it. */
function writeLength(writer: Writer, value: number, { byte, widths }: Widths): void {
  let index = 0
  while (value >= 2 ** (8 * widths[index])) index++
  writer.count(byte + index, widths[index], value)
}
