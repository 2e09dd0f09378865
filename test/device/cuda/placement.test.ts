import fc from 'fast-check'
import t from 'tap'
import { placement } from '../../../src/device/cuda/placement.js'

t.test('one unit gets everything', async (t) => {
  t.same(placement([3, 5], [7]), { units: [0, 0], bytes: [8] })
})

t.test('the largest go first, each to the unit that holds the least', async (t) => {
  t.same(placement([1, 4, 3, 2], [0, 0]), { units: [0, 0, 1, 1], bytes: [5, 5] })
  t.same(placement([2, 2], [9, 1]), { units: [1, 1], bytes: [0, 4] }, 'what is taken already counts')
})

t.test('every part is placed once, and no two units differ by more than the largest part', async (t) => {
  const sizes = fc.array(fc.integer({ min: 0, max: 1000 }), { minLength: 1, maxLength: 50 })
  fc.assert(
    fc.property(sizes, fc.integer({ min: 1, max: 8 }), (parts, count) => {
      const { units, bytes } = placement(parts, new Array(count).fill(0))
      const sums = bytes.map((_, unit) => parts.reduce((sum, size, i) => (units[i] === unit ? sum + size : sum), 0))
      t.strictSame(sums, [...bytes])
      return Math.max(...bytes) - Math.min(...bytes) <= Math.max(...parts)
    }),
  )
})
