import t from 'tap'
import { expandCoefficients, NAMED_COEFFICIENTS } from '../../kernels/orthogonalize/coefficients.js'
import {
  frobenius,
  gaussian,
  type Matrix,
  normuonStep,
  orthogonalizeByIteration,
  orthogonalizeBySvd,
  relativeDistance,
} from '../reference.js'
import { type KernelRun, loadKernel } from './session.js'

const COEFFICIENTS = expandCoefficients(NAMED_COEFFICIENTS.keller_jordan.coefficients, 5)
// Without momentum u = G.
const PLAIN = { gradient_scale: 1, c_m: 0, c_g: 1, n_m: 1, n_g: 0, eps: 1e-7, output_scale: 1 }
const BETA2 = 0.95
const FIRST = { ...PLAIN, b_v: BETA2, b_g: 1 - BETA2 }
const REPLAY = { ...PLAIN, b_v: 1, b_g: 0 }

const spec = (tall: boolean, second_momentum?: 'row' | 'col') =>
  ({ kind: 'muon', coefficients: COEFFICIENTS, tall, second_momentum, ...DTYPES }) as const
const DTYPES = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
const plain = { tall: await loadKernel(spec(true)), wide: await loadKernel(spec(false)) }
const tall = await loadKernel(spec(true, 'row'))
const square = await loadKernel(spec(false, 'row'))
const wide = await loadKernel(spec(false, 'col'))

function kernelFor(rows: number, cols: number): KernelRun {
  if (rows === cols) return square
  return rows > cols ? tall : wide
}

const matrix = (rows: number, cols: number, seed: number): Matrix => ({
  rows,
  cols,
  data: gaussian(seed, rows * cols).map(Math.fround),
})

for (const [rows, cols] of [
  [24, 40],
  [40, 24],
  [32, 32],
  [1, 40],
  [40, 1],
  [1, 1],
] as const) {
  t.test(`${rows}x${cols}: 20 steps are the float64 oracle, and replays give the same bits`, async (t) => {
    const run = kernelFor(rows, cols)
    let exact = new Float64Array(Math.max(rows, cols))
    let second: Float32Array = new Float32Array(exact.length)
    for (let step = 1; step <= 20; step++) {
      const gradient = matrix(rows, cols, step)
      const feeds = { dims: [rows, cols], gradient: gradient.data }
      const answer = await run({ ...feeds, state: { second_momentum: second }, scalars: FIRST })
      const oracle = normuonStep(exact, orthogonalizeByIteration(gradient, COEFFICIENTS), BETA2)
      const distance = relativeDistance(answer.data!, oracle.data)
      t.ok(distance <= 1e-5, `step ${step}: update ${distance}`)
      const statistic = relativeDistance(answer.second_momentum_next!, oracle.second)
      t.ok(statistic <= 1e-5, `step ${step}: second momentum ${statistic}`)
      second = answer.second_momentum_next!
      exact = Float64Array.from(oracle.second)
      const state = { momentum_buffer: answer.momentum_buffer_next!, second_momentum: second }
      t.same(await run({ ...feeds, state, scalars: { ...REPLAY, c_m: 1, c_g: 0 } }), answer)
    }
  })
}

t.test('the update has the norm that it has without the second momentum', async (t) => {
  for (const [rows, cols] of [
    [24, 40],
    [40, 24],
    [32, 32],
  ] as const) {
    const gradient = matrix(rows, cols, 5).data.map((x, i) => x * (1 + (i % cols)))
    const second_momentum = gaussian(6, Math.max(rows, cols)).map((x) => x * x)
    const feeds = { dims: [rows, cols], gradient }
    const { data } = await kernelFor(rows, cols)({ ...feeds, state: { second_momentum }, scalars: FIRST })
    const { data: bare } = await plain[rows > cols ? 'tall' : 'wide']({ ...feeds, scalars: PLAIN })
    t.ok(Math.abs(frobenius(data!) / frobenius(bare!) - 1) <= 1e-6, `${rows}x${cols}`)
    t.ok(relativeDistance(data!, bare!) > 0.1, 'and is another one')
  }
})

t.test('a zero matrix gives zero, and what was there of the statistic decays', async (t) => {
  for (const [rows, cols] of [
    [5, 9],
    [9, 5],
    [7, 7],
  ] as const) {
    for (const before of [0, 0.5]) {
      const state = { second_momentum: new Float32Array(Math.max(rows, cols)).fill(before) }
      const gradient = new Float32Array(rows * cols)
      const answer = await kernelFor(rows, cols)({ dims: [rows, cols], gradient, state, scalars: FIRST })
      t.ok(answer.data!.every((x) => x === 0))
      t.ok(answer.second_momentum_next!.every((x) => x === Math.fround(before * Math.fround(BETA2))))
    }
  }
})

t.test('lines of a matrix that are zero stay zero', async (t) => {
  const gradient = matrix(40, 24, 3)
  gradient.data.fill(0, 24, 3 * 24)
  const answer = await tall({ dims: [40, 24], gradient: gradient.data, scalars: FIRST })
  t.ok(answer.data!.subarray(24, 3 * 24).every((x) => x === 0))
  const oracle = normuonStep(new Float64Array(40), orthogonalizeBySvd(gradient, COEFFICIENTS), BETA2)
  const distance = relativeDistance(answer.data!, oracle.data)
  t.ok(distance <= 1e-5, `distance ${distance}`)
})

t.test('a rank-1 gradient has its sign in every element', async (t) => {
  for (const [rows, cols] of [
    [30, 50],
    [50, 30],
  ] as const) {
    const [u, v] = [gaussian(1, rows), gaussian(2, cols)]
    const gradient = Float64Array.from({ length: rows * cols }, (_, i) => u[Math.floor(i / cols)]! * v[i % cols]!)
    const { data } = await kernelFor(rows, cols)({ dims: [rows, cols], gradient, scalars: FIRST })
    // The first step divides every line of the longer side by its own RMS: what is left of them is equally large.
    t.ok(data!.every((x, i) => Math.sign(x) === Math.sign(gradient[i]!)))
    const oracle = normuonStep(
      new Float64Array(50),
      { rows, cols, data: gradient.map((x) => x / frobenius(gradient)) },
      BETA2,
    )
    const cosine = data!.reduce((sum, x, i) => sum + x * oracle.data[i]!, 0) / frobenius(data!) / frobenius(oracle.data)
    t.ok(cosine > 0.999, `cosine ${cosine}`)
  }
})
