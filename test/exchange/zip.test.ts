import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { crc32 } from 'node:zlib'
import fc from 'fast-check'
import t from 'tap'
import { readZip, ZipError } from '../../src/exchange/zip-reader.js'
import { ZipWriter } from '../../src/exchange/zip-writer.js'

const folder = mkdtempSync(join(tmpdir(), 'muond-zip-'))
t.teardown(() => rmSync(folder, { recursive: true }))

type Content = { name: string; bytes: Uint8Array }

async function zipOf(contents: readonly Content[]): Promise<Buffer> {
  const parts: Uint8Array[] = []
  const zip = new ZipWriter(async (bytes) => void parts.push(bytes.slice()))
  for (const { name, bytes } of contents) await zip.add(name, bytes.length, [bytes.subarray(0, 3), bytes.subarray(3)])
  await zip.end()
  t.equal(
    zip.bytes,
    parts.reduce((sum, { length }) => sum + length, 0),
  )
  return Buffer.concat(parts)
}

async function read<T>(bytes: Uint8Array, work: (file: FileHandle) => Promise<T>): Promise<T> {
  const path = join(folder, 'archive.zip')
  writeFileSync(path, bytes)
  const file = await open(path, 'r')
  try {
    return await work(file)
  } finally {
    await file.close()
  }
}

t.test('what was written is found again, every entry at a multiple of 64', async (t) => {
  const content = fc.record({
    name: fc.string({ unit: 'grapheme', minLength: 1, maxLength: 80 }),
    bytes: fc.uint8Array({ maxLength: 300 }),
  })
  await fc.assert(
    fc.asyncProperty(fc.uniqueArray(content, { selector: ({ name }) => name, maxLength: 6 }), async (contents) => {
      const bytes = await zipOf(contents)
      const entries = await read(bytes, readZip)
      t.same(
        [...entries.keys()],
        contents.map(({ name }) => name),
      )
      for (const { name, bytes: expected } of contents) {
        const { at, bytes: length } = entries.get(name)!
        t.equal(at % 64, 0)
        t.same(bytes.subarray(at, at + length), Buffer.from(expected))
        // The descriptor: a signature, the checksum and both sizes.
        t.equal(bytes.readUInt32LE(at + length + 4), crc32(expected))
      }
    }),
    { numRuns: 60, seed: 21 },
  )
})

t.test('more entries than 16 bits count are found', async (t) => {
  const contents = Array.from({ length: 66_000 }, (_, i) => ({ name: `e${i}`, bytes: Uint8Array.of(i & 255) }))
  const bytes = await zipOf(contents)
  const entries = await read(bytes, readZip)
  t.equal(entries.size, 66_000)
  t.equal(bytes[entries.get('e65999')!.at], 65999 & 255)
})

t.test('entries beyond 4 GiB, and those behind them, are found', async (t) => {
  const path = join(folder, 'large.zip')
  const zeros = new Uint8Array(2 ** 26)
  const output = await open(path, 'w+')
  let at = 0
  // The zeros are a hole in the file: nothing of it lies on the disk.
  const zip = new ZipWriter(async (bytes) => {
    if (bytes !== zeros) await output.write(bytes, 0, bytes.length, at)
    at += bytes.length
  })
  const pieces = Array.from({ length: 65 }, () => zeros)
  await zip.add('large', 65 * 2 ** 26, pieces)
  await zip.add('behind', 3, [Buffer.from('abc')])
  await zip.end()
  const entries = await readZip(output)
  t.match(entries.get('large'), { bytes: 65 * 2 ** 26 })
  const { at: place, bytes } = entries.get('behind')!
  t.ok(place > 2 ** 32)
  t.equal((await output.read(Buffer.alloc(bytes), 0, bytes, place)).buffer.toString(), 'abc')
  await output.close()
  rmSync(path)
})

t.test('an entry of another length than was said is no entry', async (t) => {
  const zip = new ZipWriter(async () => {})
  await t.rejects(zip.add('a', 4, [new Uint8Array(3)]), { message: `entry 'a' has 3 bytes, expected 4` })
})

const CONTENTS = [
  { name: 'first', bytes: Buffer.from('abc') },
  { name: 'second', bytes: Buffer.from('defg') },
]

function fullEnd(): Buffer {
  const end = Buffer.alloc(22, 0xff)
  end.writeUInt32LE(0x06054b50, 0)
  end.writeUInt16LE(0, 20)
  return end
}

t.test('an archive that is none, is cut off or lies is refused with what is wrong', async (t) => {
  const bytes = await zipOf(CONTENTS)
  const end = bytes.lastIndexOf('PK\x05\x06')
  const central = bytes.indexOf('PK\x01\x02')
  const change = (at: number, value: number, size: 2 | 4 = 4) => {
    const copy = Buffer.from(bytes)
    copy.writeUIntLE(value, at, size)
    return copy
  }
  const CASES: [string, Uint8Array, RegExp][] = [
    ['nothing', Buffer.alloc(0), /no ZIP archive, or is cut off/],
    ['text', Buffer.from('hello '.repeat(100)), /no ZIP archive, or is cut off/],
    ['no end', bytes.subarray(0, end), /no ZIP archive, or is cut off/],
    // The numbers of its end are full, and there is no room for a 64-bit end before it.
    ['an end alone that says there is a larger one', fullEnd(), /directory is said to have 4294967295 bytes/],
    ['half an end', bytes.subarray(0, -5), /no ZIP archive, or is cut off/],
    [
      'a directory behind the file',
      change(end + 16, 2 ** 30),
      /directory is said to have \d+ bytes at 1073741824, the file has/,
    ],
    ['a directory too long', change(end + 12, 2 ** 29), /directory is said to have 536870912 bytes/],
    ['a directory that is none', change(end + 16, 3), /its directory ends after 0 bytes/],
    ['more entries than there are', change(end + 10, 3, 2), /its directory ends after \d+ bytes/],
    ['a name that is too long', change(central + 28, 60_000, 2), /its directory is cut off/],
    [
      'an entry that is compressed',
      change(central + 10, 8, 2),
      /entry 'first' is compressed, expected are stored ones/,
    ],
    ['an entry that is elsewhere', change(central + 42, 7), /entry 'first' is not where it should be/],
    ['an entry behind the file', change(central + 42, 2 ** 31), /entry 'first' is not where it should be/],
    ['an entry that is too long', change(central + 24, 2 ** 20), /entry 'first' ends at byte \d+, the file has \d+/],
    ['two of one name', await zipOf([CONTENTS[0]!, CONTENTS[0]!]), /it has two entries 'first'/],
  ]
  for (const [name, archive, message] of CASES) {
    await t.rejects(read(archive, readZip), { name: 'ZipError', message }, name)
  }
  // A 64-bit end that is not there, and one that says what no file has.
  const locator = Buffer.alloc(20)
  locator.writeUInt32LE(0x07064b50)
  const full = change(end + 16, 0xffffffff)
  const wrong = Buffer.concat([full.subarray(0, end), locator, full.subarray(end)])
  await t.rejects(read(wrong, readZip), { message: 'its 64-bit end is not where it should be' })
  locator.writeBigUInt64LE(2n ** 63n, 8)
  const beyond = Buffer.concat([full.subarray(0, end), locator, full.subarray(end)])
  await t.rejects(read(beyond, readZip), { message: /it says 9223372036854776000 where it names a place/ })
})

t.test('extra fields of others are passed over', async (t) => {
  const bytes = await zipOf(CONTENTS)
  const name = bytes.indexOf('PK\x01\x02') + 46 + 'first'.length
  const whole = Buffer.concat([bytes.subarray(0, name), Buffer.from('FB\x02\x00ZZ'), bytes.subarray(name)])
  whole.writeUInt16LE(6, name - 'first'.length - 16)
  const end = whole.lastIndexOf('PK\x05\x06')
  whole.writeUInt32LE(whole.readUInt32LE(end + 12) + 6, end + 12)
  const entries = await read(whole, readZip)
  t.same([...entries.keys()], ['first', 'second'])
  // A size that is said to stand in a field of ZIP64 which is not there.
  whole.writeUInt32LE(0xffffffff, name - 'first'.length - 22)
  await t.rejects(read(whole, readZip), { message: /entry 'first' ends at byte \d{10}, the file has/ })
})

t.test('no bytes make the reader fail in another way', async (t) => {
  const bytes = await zipOf(CONTENTS)
  await fc.assert(
    fc.asyncProperty(fc.nat(bytes.length - 1), fc.nat(255), async (at, value) => {
      const damaged = Buffer.from(bytes)
      damaged[at] = value
      try {
        await read(damaged, readZip)
      } catch (error) {
        t.ok(error instanceof ZipError, String(error))
      }
    }),
    { numRuns: 300, seed: 22 },
  )
})
