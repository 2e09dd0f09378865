import t from 'tap'
import { mean, median, rms, rounded, spread } from '../../examples/statistics.js'

t.test('what they are of a few numbers', (t) => {
  t.equal(mean([1, 2, 6]), 3)
  t.equal(median([9, 1, 2]), 2)
  t.equal(median([9, 1, 2, 4]), 3)
  t.equal(rms(Float32Array.of(3, -4, 0, 0)), 2.5)
  t.equal(rounded(123456), 123500)
  t.equal(rounded(0.000123456, 2), 0.00012)
  t.end()
})

t.test('a spread is mean and range, or one number where they are the same', (t) => {
  t.equal(spread([1, 2, 6], 1), '3.0 (1.0 … 6.0)')
  t.equal(spread([2.04, 2.01], 1), '2.0')
  t.end()
})
