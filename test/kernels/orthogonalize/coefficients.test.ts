import fc from 'fast-check'
import t from 'tap'
import {
  type CoefficientSet,
  checkCoefficients,
  expandCoefficients,
  NAMED_COEFFICIENTS,
  type Triple,
} from '../../../kernels/orthogonalize/coefficients.js'
import { composed } from '../../reference.js'

const NAMED: Record<string, CoefficientSet> = NAMED_COEFFICIENTS

/** Least and largest value of the composed polynomial on a grid of (0, 1.02], logarithmic below 0.01. */
function sampled(triples: readonly Triple[]): { least: number; largest: number } {
  let [least, largest] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]
  for (let i = 1; i <= 4000; i++) {
    for (const sigma of [(1.02 * i) / 4000, 10 ** (-2 - (10 * i) / 4000)]) {
      const value = composed(triples, sigma)
      least = Math.min(least, value)
      largest = Math.max(largest, value)
    }
  }
  return { least, largest }
}

for (const [name, { coefficients, ns_steps, source }] of Object.entries(NAMED)) {
  t.test(`${name} names its source and is safe from its own number of steps on`, async (t) => {
    t.ok(source.length > 20)
    for (const steps of [ns_steps, ns_steps + 1, 20, 99]) {
      t.equal(checkCoefficients(expandCoefficients(coefficients, steps)), undefined, `${steps} steps`)
    }
  })
}

t.test('polar_express needs five steps', async (t) => {
  const { coefficients } = NAMED_COEFFICIENTS.polar_express
  for (const steps of [1, 2, 3, 4, 5, 6]) {
    t.equal(checkCoefficients(expandCoefficients(coefficients, steps)) === undefined, steps >= 5, `${steps} steps`)
  }
})

const UNSAFE: [string, Triple[], RegExp][] = [
  [
    'a sign flip',
    [[1, -2, 0]],
    /^iteration 1 of 1 takes a singular value of 1\.02 to -1\.1.*, expected above 0 and below 1\.5$/,
  ],
  [
    'a sign flip at a critical point inside',
    [[3, -10, 8.1]],
    /^iteration 1 of 1 takes a singular value of 0\.\d+ to -/,
  ],
  ['a value of 1.5', [[1.5 / 1.02, 0, 0]], /of 1\.02 to 1\.5,/],
  [
    'an explosion in the second iteration',
    [
      [2, 0, 0],
      [1, 0, 1],
    ],
    /^iteration 2 of 2 .* of 2\.04 to 37/,
  ],
  [
    'an intermediate beyond float16',
    [
      [20, 0, 0],
      [0.01, 0, 0],
    ],
    /^iteration 1 of 2 .* of 1\.02 to 20\.4, expected above 0 and below 16$/,
  ],
  ['nothing but zero', [[0, 0, 0]], /to 0, expected/],
  ['NaN', [[Number.NaN, 0, 0]], /to NaN, expected/],
  ['infinity', [[1, Number.POSITIVE_INFINITY, 0]], /to Infinity, expected/],
  ['padding left out (Polar Express as published)', unpadded(), /^iteration \d of 8/],
]

function unpadded(): Triple[] {
  return NAMED_COEFFICIENTS.polar_express.coefficients.map(([a, b, c], index, all) => {
    const s = index === all.length - 1 ? 1 : 1.05
    return [a * s, b * s ** 3, c * s ** 5]
  })
}

for (const [name, triples, reason] of UNSAFE) {
  t.test(`refused: ${name}`, async (t) => {
    t.match(checkCoefficients(triples) ?? 'accepted', reason)
  })
}

t.test(
  'what is accepted is positive and below 1.5 on a dense grid, what the grid finds unsafe is refused',
  async (t) => {
    const triple = fc
      .tuple(
        fc.double({ min: 0.5, max: 4, noNaN: true }),
        fc.double({ min: -6, max: 2, noNaN: true }),
        fc.double({ min: -1, max: 4, noNaN: true }),
      )
      .map(([a, b, c]): Triple => [a, b, c])
    let accepted = 0
    fc.assert(
      fc.property(fc.array(triple, { minLength: 1, maxLength: 3 }), (triples) => {
        const { least, largest } = sampled(triples)
        if (checkCoefficients(triples) !== undefined) return
        accepted++
        t.ok(least > 0 && largest < 1.5, `${JSON.stringify(triples)}: ${least} … ${largest}`)
      }),
      { numRuns: 500, seed: 3 },
    )
    t.ok(accepted > 20, `${accepted} accepted`)
  },
)

t.test('what is refused is unsafe on a dense grid', async (t) => {
  const [quintic] = NAMED_COEFFICIENTS.keller_jordan.coefficients
  let refused = 0
  fc.assert(
    fc.property(
      fc.double({ min: 0.8, max: 1.2, noNaN: true }),
      fc.double({ min: 0.8, max: 1.2, noNaN: true }),
      (x, y) => {
        const triples: Triple[] = [
          [quintic[0] * x, quintic[1] * y, quintic[2]],
          [quintic[0], quintic[1] * x, quintic[2] * y],
        ]
        if (checkCoefficients(triples) === undefined) return
        refused++
        // The grid may miss the very point, so it is allowed a thousandth.
        const { least, largest } = sampled(triples)
        t.ok(least <= 1e-3 || largest >= 1.499, `${JSON.stringify(triples)}: ${least} … ${largest}`)
      },
    ),
    { numRuns: 300, seed: 4 },
  )
  t.ok(refused > 20, `${refused} refused`)
})

t.test('the last triple repeats, and surplus triples are dropped', async (t) => {
  const [x, y]: Triple[] = [
    [1, 2, 3],
    [4, 5, 6],
  ]
  t.same(expandCoefficients([x, y], 4), [x, y, y, y])
  t.same(expandCoefficients([x, y], 1), [x])
  t.throws(() => expandCoefficients([], 5), /empty list/)
})
