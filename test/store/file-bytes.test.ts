import { writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import fc from 'fast-check'
import t from 'tap'
import { readingAhead } from '../../src/store/file-bytes.js'

t.test('a file that is read ahead has the bytes of the file, in whatever order they are asked for', async (t) => {
  const path = join(t.testdir(), 'file')
  const bytes = Buffer.from(Array.from({ length: 300 }, (_, i) => i % 251))
  writeFileSync(path, bytes)
  const read = fc.tuple(fc.nat(320), fc.integer({ min: 1, max: 40 }))
  await t.resolves(
    fc.assert(
      fc.asyncProperty(fc.array(read, { maxLength: 8 }), async (reads) => {
        const file = readingAhead(await open(path), 16)
        const { size } = await file.stat()
        t.equal(size, bytes.length)
        const found = reads.map(async ([at, length]) => {
          const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, at)
          return Buffer.from(buffer.subarray(0, bytesRead))
        })
        const expected = reads.map(([at, length]) => bytes.subarray(at, at + length))
        t.same(await Promise.all(found), expected)
        await file.close()
      }),
      { seed: 1, numRuns: 50 },
    ),
  )
})
