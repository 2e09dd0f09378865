import { writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import fc from 'fast-check'
import t from 'tap'
import { type FileTensor, readTensor } from '../../../src/exchange/foreign/file-tensor.js'

async function bytesOf(tensor: FileTensor): Promise<Buffer> {
  const pieces: Uint8Array[] = []
  for await (const piece of readTensor(tensor, 'it')) pieces.push(piece)
  return Buffer.concat(pieces)
}

t.test('a tensor comes in C order, however it lies', async (t) => {
  const path = join(t.testdir({}), 'numbers')
  const numbers = Float32Array.from({ length: 2000 }, (_, i) => i)
  writeFileSync(path, new Uint8Array(numbers.buffer))
  const file = await open(path, 'r')
  const layout = fc.record({
    shape: fc.array(fc.integer({ min: 1, max: 5 }), { maxLength: 4 }),
    strides: fc.array(fc.integer({ min: 0, max: 60 }), { minLength: 4, maxLength: 4 }),
    offset: fc.nat(500),
  })
  await fc.assert(
    fc.asyncProperty(layout, async ({ shape, strides, offset }) => {
      const own = strides.slice(0, shape.length)
      const positions = shape.reduce<number[][]>(
        (before, size) => before.flatMap((position) => Array.from({ length: size }, (_, i) => [...position, i])),
        [[]],
      )
      const expected = positions.map((position) => position.reduce((sum, at, i) => sum + at * own[i]!, offset))
      const tensor = { file, dtype: 'float32', at: 4 * offset, shape, strides: own }
      const read = await bytesOf(tensor)
      t.same([...new Float32Array(new Uint8Array(read).buffer)], expected)
    }),
    { numRuns: 200, seed: 27 },
  )
  await file.close()
})

t.test('a file that has become shorter is told', async (t) => {
  const path = join(t.testdir({}), 'short')
  writeFileSync(path, Buffer.alloc(20))
  const file = await open(path, 'r')
  const ordered = { file, dtype: 'float32', at: 4, shape: [2, 3], strides: [3, 1] }
  await t.rejects(bytesOf(ordered), { message: 'it has 16 bytes in the file, expected 24' })
  await t.rejects(bytesOf({ ...ordered, strides: [1, 2] }), { message: 'it has 16 bytes in the file, expected 24' })
  await t.rejects(bytesOf({ ...ordered, dtype: 'bool' }), { message: /^it is bool, expected one of float32/ })
  await file.close()
})
