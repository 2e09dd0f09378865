import { crc32 } from 'node:zlib'

// Writes ZIP archives as torch does: no entry is compressed, and the bytes of each begin at a multiple of 64, up to
// which an extra field fills. An entry's size stands before its bytes, its checksum behind them (APPNOTE.TXT 4.3.9,
// 4.5.3).

/** Takes the bytes of a file, in order. */
export type Write = (bytes: Uint8Array) => Promise<void>

type Entry = { name: Buffer; bytes: number; at: number; crc: number }

const ALIGNMENT = 64
const LOCAL_BYTES = 30
const LOCAL = 0x04034b50
const DESCRIPTOR = 0x08074b50
const CENTRAL = 0x02014b50
const END = 0x06054b50
const END_64 = 0x06064b50
const LOCATOR_64 = 0x07064b50
/** Bits 3 and 11: the checksum follows the bytes, and names are UTF-8. */
const FLAGS = 0x0808
const VERSION = 45
const EXTRA_64 = 1
/** "FB": the id of torch's own filling field. */
const EXTRA_FILLER = 0x4246
const MAX_16 = 0xffff
const MAX_32 = 0xffffffff
/** 1 January 1980, the first day that the format has. One date for all, so that equal contents give equal files. */
const DATE = 0x21

/** Writes an archive from front to back. */
export class ZipWriter {
  /** How many bytes of the archive were written. */
  bytes = 0
  readonly #write: Write
  readonly #entries: Entry[] = []

  constructor(write: Write) {
    this.#write = write
  }

  /** Writes an entry of `bytes` bytes; throws where its pieces have another length. */
  async add(name: string, bytes: number, pieces: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<void> {
    const next = await this.begin(name, bytes)
    for await (const piece of pieces) await next.write(piece)
    await next.end()
  }

  /** Begins an entry of `bytes` bytes. */
  async begin(name: string, bytes: number): Promise<{ write: Write; end: () => Promise<void> }> {
    const entry: Entry = { name: Buffer.from(name), bytes, at: this.bytes, crc: 0 }
    await this.#put(localHeader(entry))
    let written = 0
    const write = async (piece: Uint8Array) => {
      entry.crc = crc32(piece, entry.crc)
      written += piece.length
      await this.#put(piece)
    }
    const end = async () => {
      if (written !== bytes) throw new Error(`entry '${name}' has ${written} bytes, expected ${bytes}`)
      await this.#put(descriptor(entry))
      this.#entries.push(entry)
    }
    return { write, end }
  }

  /** Ends the archive. */
  async end(): Promise<void> {
    const at = this.bytes
    for (const entry of this.#entries) await this.#put(centralHeader(entry))
    await this.#put(ending({ entries: this.#entries.length, at, bytes: this.bytes - at }))
  }

  async #put(bytes: Uint8Array): Promise<void> {
    await this.#write(bytes)
    this.bytes += bytes.length
  }
}

function isLarge({ bytes }: Entry): boolean {
  return bytes >= MAX_32
}

function localHeader(entry: Entry): Buffer {
  const { name, bytes, at } = entry
  const sizes = isLarge(entry) ? extra(EXTRA_64, [bytes, bytes]) : Buffer.alloc(0)
  const unaligned = at + LOCAL_BYTES + name.length + sizes.length + 4
  const filler = Buffer.alloc(4 + ((ALIGNMENT - (unaligned % ALIGNMENT)) % ALIGNMENT), 'Z')
  filler.writeUInt16LE(EXTRA_FILLER, 0)
  filler.writeUInt16LE(filler.length - 4, 2)
  const header = Buffer.alloc(LOCAL_BYTES)
  header.writeUInt32LE(LOCAL, 0)
  header.writeUInt16LE(VERSION, 4)
  header.writeUInt16LE(FLAGS, 6)
  header.writeUInt16LE(DATE, 12)
  header.writeUInt32LE(Math.min(bytes, MAX_32), 18)
  header.writeUInt32LE(Math.min(bytes, MAX_32), 22)
  header.writeUInt16LE(name.length, 26)
  header.writeUInt16LE(sizes.length + filler.length, 28)
  return Buffer.concat([header, name, sizes, filler])
}

function descriptor(entry: Entry): Buffer {
  const { bytes, crc } = entry
  const large = isLarge(entry)
  const record = Buffer.alloc(large ? 24 : 16)
  record.writeUInt32LE(DESCRIPTOR, 0)
  record.writeUInt32LE(crc, 4)
  for (const i of [0, 1]) {
    if (large) record.writeBigUInt64LE(BigInt(bytes), 8 + 8 * i)
    else record.writeUInt32LE(bytes, 8 + 4 * i)
  }
  return record
}

function centralHeader(entry: Entry): Buffer {
  const { name, bytes, at, crc } = entry
  const beyond = [...(isLarge(entry) ? [bytes, bytes] : []), ...(at >= MAX_32 ? [at] : [])]
  const large = beyond.length > 0 ? extra(EXTRA_64, beyond) : Buffer.alloc(0)
  const header = Buffer.alloc(46)
  header.writeUInt32LE(CENTRAL, 0)
  header.writeUInt16LE(VERSION, 4)
  header.writeUInt16LE(VERSION, 6)
  header.writeUInt16LE(FLAGS, 8)
  header.writeUInt16LE(DATE, 14)
  header.writeUInt32LE(crc, 16)
  header.writeUInt32LE(Math.min(bytes, MAX_32), 20)
  header.writeUInt32LE(Math.min(bytes, MAX_32), 24)
  header.writeUInt16LE(name.length, 28)
  header.writeUInt16LE(large.length, 30)
  header.writeUInt32LE(Math.min(at, MAX_32), 42)
  return Buffer.concat([header, name, large])
}

/** The records that end an archive; those of ZIP64 come first where a number is too large for the old record. */
function ending({ entries, at, bytes }: { entries: number; at: number; bytes: number }): Buffer {
  const end = Buffer.alloc(22)
  end.writeUInt32LE(END, 0)
  end.writeUInt16LE(Math.min(entries, MAX_16), 8)
  end.writeUInt16LE(Math.min(entries, MAX_16), 10)
  end.writeUInt32LE(Math.min(bytes, MAX_32), 12)
  end.writeUInt32LE(Math.min(at, MAX_32), 16)
  if (entries < MAX_16 && at < MAX_32 && bytes < MAX_32) return end
  const large = Buffer.alloc(56)
  large.writeUInt32LE(END_64, 0)
  large.writeBigUInt64LE(44n, 4)
  large.writeUInt16LE(VERSION, 12)
  large.writeUInt16LE(VERSION, 14)
  large.writeBigUInt64LE(BigInt(entries), 24)
  large.writeBigUInt64LE(BigInt(entries), 32)
  large.writeBigUInt64LE(BigInt(bytes), 40)
  large.writeBigUInt64LE(BigInt(at), 48)
  const locator = Buffer.alloc(20)
  locator.writeUInt32LE(LOCATOR_64, 0)
  locator.writeBigUInt64LE(BigInt(at + bytes), 8)
  locator.writeUInt32LE(1, 16)
  return Buffer.concat([large, locator, end])
}

/** An extra field of 8-byte numbers. */
function extra(id: number, numbers: readonly number[]): Buffer {
  const field = Buffer.alloc(4 + 8 * numbers.length)
  field.writeUInt16LE(id, 0)
  field.writeUInt16LE(8 * numbers.length, 2)
  for (const [i, number] of numbers.entries()) field.writeBigUInt64LE(BigInt(number), 4 + 8 * i)
  return field
}
