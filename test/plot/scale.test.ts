import fc from 'fast-check'
import t from 'tap'
import { logScale, nameScale, scale } from '../../src/plot/scale.js'

t.test('a short logarithmic axis has ticks of 1, 2 and 5 times a power of ten, from one tick to another', (t) => {
  const { ticks, place, label } = logScale([0.03, 1.5, 0.4], [0, 100])
  t.same(ticks, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
  t.equal(place(0.02), 0)
  t.equal(place(0.2), 50)
  t.equal(place(2), 100)
  t.same(ticks.map(label), ['0.02', '0.05', '0.1', '0.2', '0.5', '1', '2'])
  t.end()
})

t.test('values that are ticks themselves, and a single value, stand on the axis', (t) => {
  t.same(logScale([1, 10], [0, 1]).ticks, [1, 2, 5, 10])
  t.same(logScale([100], [0, 1]).ticks, [100, 200])
  t.same(logScale([300, 300], [0, 1]).ticks, [200, 500])
  t.equal(scale([3], [0, 100]).place(3), 50)
  t.end()
})

t.test('names stand in the middle of equal shares', (t) => {
  const { ticks, place, label } = nameScale(['a', 'b', 'c', 'd'], [0, 80])
  t.same(ticks.map(place), [10, 30, 50, 70])
  t.same(ticks.map(label), ['a', 'b', 'c', 'd'])
  t.end()
})

t.test('every value lies between the ends', (t) => {
  const positive = fc.double({ min: 1e-6, max: 1e6, noNaN: true })
  fc.assert(
    fc.property(fc.array(positive, { minLength: 1, maxLength: 9 }), (values) => {
      const { place, ticks } = logScale(values, [64, 696])
      const ordered = ticks.every((tick, i) => i === 0 || tick > ticks[i - 1]!)
      return ordered && values.every((value) => place(value) >= 64 - 1e-6 && place(value) <= 696 + 1e-6)
    }),
    { seed: 1 },
  )
  t.end()
})
