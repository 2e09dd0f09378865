import fc from 'fast-check'
import t from 'tap'
import { bytesOf, Elements, firstRefused, GIVEN_DTYPES } from '../../src/store/elements.js'

t.test('how a tensor is cut into pieces does not show', async (t) => {
  fc.assert(
    fc.property(
      fc.constantFrom(...GIVEN_DTYPES),
      fc.constantFrom('F32' as const, 'BF16' as const),
      fc.constantFrom({}, { multiply: 0.05 }, { divide: 0.05 }),
      fc.array(fc.float({ noNaN: true, noDefaultInfinity: true, min: -1000, max: 1000 }), { maxLength: 20 }),
      fc.array(fc.nat(9), { minLength: 1, maxLength: 40 }),
      (from, to, factors, values, cuts) => {
        const given =
          from === 'F32'
            ? bytesOf(Float32Array.from(values))
            : bytesOf(Uint16Array.from(values, (value) => Math.abs(value) * 20))
        const whole = bytesOf(new Elements({ from, to, ...factors }).take(given))
        const elements = new Elements({ from, to, ...factors })
        const parts: Uint8Array[] = []
        let at = 0
        for (const cut of cuts) {
          parts.push(bytesOf(elements.take(given.subarray(at, at + cut))).slice())
          at = Math.min(given.length, at + cut)
        }
        parts.push(bytesOf(elements.take(given.subarray(at))))
        t.same(Buffer.concat(parts), Buffer.from(whole))
      },
    ),
    { numRuns: 300, seed: 25 },
  )
})

t.test('what is not finite, or below zero, is found with its place', async (t) => {
  const signed = { mayBeNegative: true }
  t.equal(firstRefused(Float32Array.of(0, -1, 3.4e38), signed), undefined)
  t.same(firstRefused(Float32Array.of(0, NaN, Infinity), signed), { index: 1, value: NaN })
  t.same(firstRefused(Float32Array.of(0, 1, -Infinity), signed), { index: 2, value: -Infinity })
  t.same(firstRefused(Float32Array.of(-0, 1, -1e-45), { mayBeNegative: false }), {
    index: 2,
    value: Math.fround(-1e-45),
  })
  // The bfloat16 patterns of 1, infinity and NaN.
  t.same(firstRefused(Uint16Array.of(0x3f80, 0x7f80), signed), { index: 1, value: Infinity })
  t.same(firstRefused(Uint16Array.of(0x7fc0), signed), { index: 0, value: NaN })
  t.equal(firstRefused(new Uint16Array(0), signed), undefined)
})
