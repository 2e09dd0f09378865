import fc from 'fast-check'
import t from 'tap'
import { Assembly, chunksOf } from '../../src/wire/chunks.js'
import { Extent } from '../../src/wire/ranges.js'

const label = "parameter 'w', gradient"

t.test('the chunks of a tensor are what its receiver accepts', async (t) => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 5000 }), fc.integer({ min: 1, max: 700 }), (bytes, chunk_bytes) => {
      const assembly = new Assembly(Extent.whole(bytes), label)
      for (const chunk of chunksOf(bytes, chunk_bytes)) {
        t.notOk(assembly.complete)
        t.ok(chunk.length > 0 && chunk.length <= chunk_bytes)
        if (chunk_bytes >= 4) t.equal(chunk.offset % 4, 0, 'elements are whole')
        assembly.accept(chunk)
      }
      t.ok(assembly.complete)
      t.equal(assembly.received, bytes)
    }),
    { seed: 3, numRuns: 50 },
  )
})

t.test('chunks are as large as allowed', async (t) => {
  t.same(
    [...chunksOf(10, 4)],
    [
      { offset: 0, length: 4 },
      { offset: 4, length: 4 },
      { offset: 8, length: 2 },
    ],
  )
  t.same([...chunksOf(4, 4)], [{ offset: 0, length: 4 }])
  t.same([...chunksOf(0, 4)], [])
})

const refused = [
  ['a gap', { offset: 8, length: 4 }, 'FRAME_UNEXPECTED', /offset 8, expected 4/],
  ['a repeated chunk', { offset: 0, length: 4 }, 'FRAME_UNEXPECTED', /offset 0, expected 4/],
  ['an empty chunk', { offset: 4, length: 0 }, 'FRAME_UNEXPECTED', /empty chunk at offset 4/],
  ['more than the tensor has', { offset: 4, length: 7 }, 'SHAPE_MISMATCH', /has 11 bytes or more, expected 10/],
] as const

for (const [what, chunk, code, message] of refused) {
  t.test(`${what} is refused and changes nothing`, async (t) => {
    const assembly = new Assembly(Extent.whole(10), label)
    assembly.accept({ offset: 0, length: 4 })
    t.throws(() => assembly.accept(chunk), { code, message })
    t.equal(assembly.received, 4)
    assembly.accept({ offset: 4, length: 6 })
    t.ok(assembly.complete)
  })
}
