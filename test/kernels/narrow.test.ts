import fc from 'fast-check'
import t from 'tap'
import { bfloat16ToNumber, float16Values, numberToBfloat16 } from '../../kernels/narrow.js'

t.test('a float16 pattern has the value IEEE 754 gives it', (t) => {
  const table: [pattern: number, value: number][] = [
    [0x0000, 0],
    [0x8000, -0],
    [0x3c00, 1],
    [0xc000, -2],
    [0x3555, 0.333251953125],
    [0x7bff, 65504],
    [0x0400, 2 ** -14],
    [0x0001, 2 ** -24],
    [0x83ff, -1023 * 2 ** -24],
    [0x7c00, Infinity],
    [0xfc00, -Infinity],
    [0x7e01, NaN],
  ]
  const values = float16Values()
  for (const [pattern, value] of table) t.ok(Object.is(values[pattern], value), `0x${pattern.toString(16)} is ${value}`)
  t.equal(values, float16Values(), 'the table is built once')
  t.end()
})

t.test('every bfloat16 survives the way through a number', (t) => {
  for (let pattern = 0; pattern < 0x10000; pattern++) {
    const value = bfloat16ToNumber(pattern)
    const back = numberToBfloat16(value)
    if (back === pattern || (Number.isNaN(value) && Number.isNaN(bfloat16ToNumber(back)))) continue
    t.fail(`0x${pattern.toString(16)} came back as 0x${back.toString(16)}`)
  }
  t.end()
})

t.test('a number becomes the nearest bfloat16, ties to even', (t) => {
  const finite = fc.oneof(
    fc.float({ noNaN: true, noDefaultInfinity: true, max: 2 ** 120, min: -(2 ** 120) }),
    fc.double({ noNaN: true, min: -1e30, max: 1e30 }),
  )
  fc.assert(
    fc.property(finite, (value) => {
      const pattern = numberToBfloat16(value)
      const error = Math.abs(bfloat16ToNumber(pattern) - value)
      for (const neighbour of [pattern - 1, pattern + 1]) {
        const other = Math.abs(bfloat16ToNumber(neighbour) - value)
        if (other < error || (other === error && pattern & 1)) return false
      }
      return true
    }),
    { seed: 11, numRuns: 5000 },
  )
  t.end()
})

t.test('rounding to bfloat16 happens once, not first to float32', (t) => {
  const tie = 1 + 2 ** -8
  t.equal(bfloat16ToNumber(numberToBfloat16(tie)), 1, 'a tie goes to even')
  t.equal(bfloat16ToNumber(numberToBfloat16(tie + 2 ** -40)), 1 + 2 ** -7, 'just above the tie goes up')
  t.equal(bfloat16ToNumber(numberToBfloat16(1 + 3 * 2 ** -8)), 1 + 2 ** -6, 'an odd tie goes up')
  t.equal(bfloat16ToNumber(numberToBfloat16(1 + 3 * 2 ** -8 - 2 ** -40)), 1 + 2 ** -7, 'just below the tie goes down')
  t.equal(numberToBfloat16(3.4e38), 0x7f80, 'beyond the largest is infinity')
  t.end()
})
