import { Tensor } from 'onnxruntime-node'
import t from 'tap'
import { Graph } from '../../../kernels/graph/graph.js'
import { expandCoefficients, NAMED_COEFFICIENTS, type Triple } from '../../../kernels/orthogonalize/coefficients.js'
import {
  halfError,
  halfIterations,
  halvesAround,
  type Iterations,
  toHalf,
} from '../../../kernels/orthogonalize/exact-scalars.js'
import { gramNewtonSchulz, halfSegments, type Segments } from '../../../kernels/orthogonalize/gram-newton-schulz.js'
import { buildOrthogonalize, formFor, type OrthogonalizeSpec } from '../../../kernels/orthogonalize/orthogonalize.js'
import { composed, frobenius, gaussian, orthogonalizeByIteration, relativeDistance } from '../../reference.js'
import { float32, openSession, values } from '../session.js'

const SETS = Object.entries(NAMED_COEFFICIENTS).map(([name, { coefficients, ns_steps }]) => {
  return { name, triples: expandCoefficients(coefficients, ns_steps) }
})
const DEFAULT = SETS[0].triples
const SIGMAS = Array.from({ length: 100 }, (_, i) => (i + 1) / 100)

/** What the searched iterations make of a singular value, in float64. */
function direct({ iterations, output_scale }: Iterations, sigma: number): number {
  return (
    output_scale *
    iterations.reduce((y, { alpha, beta, gamma, delta }) => {
      const a = alpha * y * y
      return delta * y + (gamma * a * a + beta * a) * y
    }, sigma)
  )
}

function gram({ segments, input_scale, output_scale }: Segments, sigma: number): number {
  let x = sigma * input_scale
  for (const { alpha, iterations, output } of segments) {
    let r = alpha * x * x
    let q = 1
    for (const { beta, gamma, rho } of iterations) {
      const z = gamma * r * r + beta * r
      q *= 1 + z
      r *= rho * (1 + z) ** 2
    }
    x *= output * q
  }
  return x * output_scale
}

t.test('a half number is the nearest one of eleven significant bits', async (t) => {
  t.equal(toHalf(0), 0)
  t.equal(toHalf(1), 1)
  t.equal(toHalf(3.4445), 3.4453125)
  t.equal(toHalf(-4.775), -4.7734375)
  t.equal(toHalf(2.0315), 2.03125)
  t.equal(halfError(0), 0)
  t.equal(halfError(1.5), 0)
  t.equal(halfError(1 + 2 ** -11), Math.abs(1 / (1 + 2 ** -11) - 1))
})

t.test('the grid of half numbers spans a factor of two', async (t) => {
  for (const middle of [1, 1.7, 3.4445, 100]) {
    const numbers = halvesAround(middle)
    t.ok(numbers[0] >= middle / Math.SQRT2 && (numbers.at(-1) ?? 0) <= middle * Math.SQRT2)
    t.ok(numbers.length > 1000 && numbers.every((number) => toHalf(number) === number))
    t.ok(numbers.every((number, i) => i === 0 || number > numbers[i - 1]))
  }
})

for (const { name, triples } of SETS) {
  t.test(`${name}: every scalar is a float16 number and the polynomial is kept`, async (t) => {
    const found = halfIterations(triples)
    t.equal(found.iterations.length, triples.length)
    t.ok(found.error < 1e-6, `error ${found.error}`)
    for (const iteration of found.iterations) {
      for (const scalar of Object.values(iteration)) t.equal(toHalf(scalar), scalar)
    }
    // A change of a scalar is amplified by the slope of what follows: 8e-5 for the steepest set.
    for (const sigma of SIGMAS) t.ok(Math.abs(direct(found, sigma) / composed(triples, sigma) - 1) < 2e-4)
  })

  t.test(`${name}: the same for the Gram form`, async (t) => {
    const found = halfSegments(triples)
    t.same(
      found.segments.map(({ iterations }) => iterations.length),
      [3, ...new Array(triples.length - 3).fill(1)],
    )
    for (const { alpha, iterations, output } of found.segments) {
      for (const scalar of [alpha, output, ...iterations.flatMap((iteration) => Object.values(iteration))]) {
        t.equal(toHalf(scalar), scalar)
      }
    }
    for (const sigma of SIGMAS) t.ok(Math.abs(gram(found, sigma) / composed(triples, sigma) - 1) < 1e-3)
  })
}

t.test('fewer iterations than the first segment has are one segment', async (t) => {
  for (const count of [1, 2]) {
    const found = halfSegments(DEFAULT.slice(0, count))
    t.equal(found.segments.length, 1)
    for (const sigma of SIGMAS) t.ok(Math.abs(gram(found, sigma) / composed(DEFAULT.slice(0, count), sigma) - 1) < 1e-3)
  }
})

t.test('no iteration is refused', async (t) => {
  t.throws(() => halfSegments([]), /there is no iteration/)
  const graph = new Graph('empty')
  const x = graph.input('x', 'float16', ['rows', 'cols'])
  const empty = { segments: [{ alpha: 1, iterations: [], output: 1 }], input_scale: 1, output_scale: 1, error: 0 }
  t.throws(() => gramNewtonSchulz(graph, x, { ...empty, tall: false }), /a segment has no iteration/)
})

const cast = new Graph('cast')
cast.output('half', cast.cast(cast.input('x', 'float32', ['rows', 'cols']), 'float16'), {
  dtype: 'float16',
  dims: ['rows', 'cols'],
})
const back = new Graph('back')
back.output('x', back.cast(back.input('half', 'float16', ['rows', 'cols']), 'float32'), { dims: ['rows', 'cols'] })
const [toFloat16, toFloat32] = await Promise.all([openSession(cast.bytes()), openSession(back.bytes())])

/** The model's own result for a Gaussian matrix, and the oracle's. On the CPU the products are taken in float32. */
async function distance(spec: OrthogonalizeSpec, [rows, cols]: readonly [number, number]): Promise<number> {
  const { model, input_scale, output_scale } = buildOrthogonalize(spec)
  const session = await openSession(model)
  const data = gaussian(rows, rows * cols)
  const norm = frobenius(data)
  const x = float32(
    data.map((value) => (value / norm) * input_scale),
    [rows, cols],
  )
  const { half } = await toFloat16.run({ x })
  const { o } = await session.run({ x: new Tensor('float16', half.data as Uint16Array, [rows, cols]) })
  const result = values((await toFloat32.run({ half: o })).x).map((value) => value * output_scale)
  return relativeDistance(result, orthogonalizeByIteration({ rows, cols, data }, spec.coefficients as Triple[]).data)
}

for (const form of ['direct', 'gram'] as const) {
  for (const [rows, cols] of [
    [96, 96],
    [48, 160],
    [160, 48],
    [1, 40],
    [40, 1],
  ] as const) {
    t.test(`${form} ${rows}x${cols} is the orthogonalized matrix within float16's rounding`, async (t) => {
      const found = await distance({ coefficients: DEFAULT, tall: rows > cols, form }, [rows, cols])
      t.ok(found < 2e-3, `distance ${found}`)
    })
  }
}

t.test('the Gram form is for matrices with one side much longer, and not for small ones', async (t) => {
  t.equal(formFor(768, 3072), 'gram')
  t.equal(formFor(3072, 768), 'gram')
  t.equal(formFor(768, 768), 'direct')
  t.equal(formFor(2048, 2304), 'direct')
  t.equal(formFor(64, 4096), 'direct')
})
