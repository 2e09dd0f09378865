import t from 'tap'
import { TOGETHER_BYTES, together } from '../../src/keep/state-file.js'

const HALF = TOGETHER_BYTES / 2

t.test('small pieces are joined, large ones are as they were, and no byte is lost', async (t) => {
  const sizes = [1, 2, HALF, HALF, TOGETHER_BYTES, 3 * TOGETHER_BYTES, 5, TOGETHER_BYTES, 7]
  const pieces = sizes.map((size, i) => new Uint8Array(size).fill(i))
  const joined = [...together(pieces)]
  t.same(
    joined.map(({ length }) => length),
    [3 + 2 * HALF, TOGETHER_BYTES, 3 * TOGETHER_BYTES, 5 + TOGETHER_BYTES, 7],
  )
  t.equal(joined[1], pieces[4], 'without a copy')
  t.ok(Buffer.concat(joined).equals(Buffer.concat(pieces)))
  t.same([...together([new Uint8Array(TOGETHER_BYTES)])].length, 1)
  t.same([...together([])], [])
})
