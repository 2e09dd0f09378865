import type { FileHandle } from 'node:fs/promises'
import { readBytes } from '../store/file-bytes.js'

// Reads the directory of a ZIP archive (APPNOTE.TXT 4.3) whose entries are not compressed: torch.save and numpy.savez
// write such.

/** An entry: `bytes` bytes from byte `at` of the file. */
export type ZipEntry = { at: number; bytes: number }

/** A file is no ZIP archive, is damaged, or has an entry that is compressed. */
export class ZipError extends Error {
  override readonly name = 'ZipError'
}

const END = 0x06054b50
const END_BYTES = 22
const LOCATOR_64_BYTES = 20
const LOCATOR_64 = 0x07064b50
const END_64 = 0x06064b50
const END_64_BYTES = 56
const CENTRAL = 0x02014b50
const CENTRAL_BYTES = 46
const LOCAL = 0x04034b50
const LOCAL_BYTES = 30
const COMMENT_BYTES = 65_535
const MAX_16 = 0xffff
const MAX_32 = 0xffffffff
const MOST_DIRECTORY_BYTES = 2 ** 28

/** The entries of an archive by name. Throws ZipError. */
export async function readZip(file: FileHandle): Promise<Map<string, ZipEntry>> {
  const { size } = await file.stat()
  const { at, bytes, entries } = await findDirectory(file, size)
  if (bytes > MOST_DIRECTORY_BYTES || at + bytes > size)
    throw new ZipError(`its directory is said to have ${bytes} bytes at ${at}, the file has ${size}`)
  const directory = await readBytes(file, at, bytes)
  const found = new Map<string, ZipEntry>()
  let next = 0
  for (let i = 0; i < entries; i++) {
    const { name, header, length } = readEntry(directory, next)
    next += length
    if (found.has(name)) throw new ZipError(`it has two entries '${name}'`)
    found.set(name, await locate(file, { name, header, size }))
  }
  return found
}

type Header = { at: number; bytes: number }

/**
 * Finds the directory by the record that ends the archive. Only a comment may follow it; torch and numpy write none.
 */
async function findDirectory(file: FileHandle, size: number): Promise<{ at: number; bytes: number; entries: number }> {
  const start = Math.max(0, size - END_BYTES - COMMENT_BYTES)
  const tail = await readBytes(file, start, size - start)
  const found = tail.lastIndexOf(signature(END))
  if (found < 0 || found + END_BYTES > tail.length)
    throw new ZipError('it is no ZIP archive, or is cut off: it has no end')
  const end = tail.subarray(found)
  const [entries, bytes, at] = [end.readUInt16LE(10), end.readUInt32LE(12), end.readUInt32LE(16)]
  if (entries < MAX_16 && bytes < MAX_32 && at < MAX_32) return { at, bytes, entries }
  const locatorAt = start + found - LOCATOR_64_BYTES
  const locator = locatorAt < 0 ? Buffer.alloc(0) : await readBytes(file, locatorAt, LOCATOR_64_BYTES)
  if (locator.length < LOCATOR_64_BYTES || locator.readUInt32LE(0) !== LOCATOR_64) return { at, bytes, entries }
  const large = await readBytes(file, long(locator, 8), END_64_BYTES)
  if (large.length < END_64_BYTES || large.readUInt32LE(0) !== END_64)
    throw new ZipError('its 64-bit end is not where it should be')
  return { entries: long(large, 32), bytes: long(large, 40), at: long(large, 48) }
}

function readEntry(directory: Buffer, at: number): { name: string; header: Header; length: number } {
  const entry = directory.subarray(at)
  if (entry.length < CENTRAL_BYTES || entry.readUInt32LE(0) !== CENTRAL)
    throw new ZipError(`its directory ends after ${at} bytes`)
  const [nameBytes, extraBytes, commentBytes] = [28, 30, 32].map((offset) => entry.readUInt16LE(offset))
  const length = CENTRAL_BYTES + nameBytes + extraBytes + commentBytes
  if (entry.length < length) throw new ZipError('its directory is cut off')
  const name = entry.toString('utf8', CENTRAL_BYTES, CENTRAL_BYTES + nameBytes)
  if (entry.readUInt16LE(10) !== 0) throw new ZipError(`entry '${name}' is compressed, expected are stored ones`)
  const extra = entry.subarray(CENTRAL_BYTES + nameBytes, CENTRAL_BYTES + nameBytes + extraBytes)
  const large = numbersBeyond(extra)
  const [compressed, bytes, offset] = [20, 24, 42].map((field) => entry.readUInt32LE(field))
  const full = (value: number) => (value === MAX_32 ? (large.shift() ?? value) : value)
  // The ZIP64 numbers come in this order, each only where its 32-bit field is full.
  const header = { bytes: full(bytes), stored: full(compressed), at: full(offset) }
  return { name, header, length }
}

/** The 8-byte numbers of an entry's ZIP64 extra field; none where there is no such field. */
function numbersBeyond(extra: Buffer): number[] {
  for (let at = 0; at + 4 <= extra.length; ) {
    const [id, bytes] = [extra.readUInt16LE(at), extra.readUInt16LE(at + 2)]
    const field = extra.subarray(at + 4, at + 4 + bytes)
    if (id === 1) return Array.from({ length: Math.floor(field.length / 8) }, (_, i) => long(field, 8 * i))
    at += 4 + bytes
  }
  return []
}

/** Finds an entry's bytes: they follow a local header, whose name and extra field may have other lengths than here. */
async function locate(
  file: FileHandle,
  { name, header, size }: { name: string; header: Header; size: number },
): Promise<ZipEntry> {
  const local = await readBytes(file, header.at, LOCAL_BYTES)
  if (local.length < LOCAL_BYTES || local.readUInt32LE(0) !== LOCAL)
    throw new ZipError(`entry '${name}' is not where it should be`)
  const at = header.at + LOCAL_BYTES + local.readUInt16LE(26) + local.readUInt16LE(28)
  if (at + header.bytes <= size) return { at, bytes: header.bytes }
  throw new ZipError(`entry '${name}' ends at byte ${at + header.bytes}, the file has ${size}`)
}

function long(bytes: Buffer, at: number): number {
  const value = Number(bytes.readBigUInt64LE(at))
  if (Number.isSafeInteger(value)) return value
  throw new ZipError(`it says ${value} where it names a place in the file`)
}

function signature(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(value)
  return bytes
}
