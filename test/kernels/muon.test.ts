import fc from 'fast-check'
import t from 'tap'
import type { KernelSpec } from '../../kernels/kernel.js'
import { expandCoefficients, NAMED_COEFFICIENTS, type Triple } from '../../kernels/orthogonalize/coefficients.js'
import {
  composed,
  frobenius,
  gaussian,
  type Matrix,
  momentumStep,
  orthogonalizeByIteration,
  orthogonalizeBySvd,
  relativeDistance,
  transpose,
} from '../reference.js'
import { type KernelRun, loadKernel } from './session.js'

const DEFAULT = expandCoefficients(NAMED_COEFFICIENTS.keller_jordan.coefficients, 5)
// Without momentum u = G; eps as torch's default.
const PLAIN = { gradient_scale: 1, c_m: 0, c_g: 1, n_m: 1, n_g: 0, eps: 1e-7, output_scale: 1 }
const float32Tolerance = 1e-5

function spec(coefficients: readonly Triple[], tall: boolean): KernelSpec {
  return { kind: 'muon', coefficients, tall, gradient_dtype: 'float32', update_dtype: 'float32' }
}

const wide = await loadKernel(spec(DEFAULT, false))
const tall = await loadKernel(spec(DEFAULT, true))

function matrix([rows, cols]: readonly [number, number], seed: number, scale = 1): Matrix {
  return { rows, cols, data: gaussian(seed, rows * cols).map((value) => Math.fround(value * scale)) }
}

async function orthogonalize(
  x: Matrix,
  run: KernelRun = x.rows > x.cols ? tall : wide,
  scalars = {},
): Promise<Float32Array> {
  const { data } = await run({ dims: [x.rows, x.cols], gradient: x.data, scalars: { ...PLAIN, ...scalars } })
  return data
}

// ONNX Runtime's CPU provider computes float16 products in float32: what is tested is their scalars. test/gpu has the rest.
t.test('products of float16 have scalars of their own and come out the same, tall and wide', async (t) => {
  for (const [rows, cols] of [
    [64, 256],
    [256, 64],
    [300, 300],
  ] as const) {
    const x = matrix([rows, cols], rows)
    const half = await loadKernel(spec(DEFAULT, rows > cols), { half: true })
    const distance = relativeDistance(await orthogonalize(x, half), orthogonalizeByIteration(x, DEFAULT).data)
    t.ok(distance < 2e-3, `${rows}x${cols}: distance ${distance}`)
  }
})

const SHAPES = [
  [64, 64],
  [96, 40],
  [40, 96],
  [1, 32],
  [32, 1],
  [1, 1],
  [256, 512],
] as const

for (const [rows, cols] of SHAPES) {
  t.test(`${rows}x${cols} is within 1e-5 of the float64 oracle`, async (t) => {
    const x = matrix([rows, cols], rows + cols)
    const expected = orthogonalizeByIteration(x, DEFAULT).data
    const distance = relativeDistance(await orthogonalize(x), expected)
    t.ok(distance <= float32Tolerance, `distance ${distance}`)
    t.comment(`${rows}x${cols} ${distance}`)
  })
}

for (const [rows, cols] of SHAPES.filter(([rows]) => rows < 256)) {
  t.test(`${rows}x${cols}: U p(Σ) Vᵀ and the float64 iteration agree, so either is the oracle`, async (t) => {
    const x = matrix([rows, cols], 7)
    const distance = relativeDistance(orthogonalizeByIteration(x, DEFAULT).data, orthogonalizeBySvd(x, DEFAULT).data)
    t.ok(distance <= 1e-11, `distance ${distance}`)
  })
}

for (const [name, { coefficients, ns_steps }] of Object.entries(NAMED_COEFFICIENTS)) {
  t.test(`${name} is within 1e-5 of U p(Σ) Vᵀ, wide and tall`, async (t) => {
    const triples = expandCoefficients(coefficients, ns_steps)
    for (const isTall of [false, true]) {
      const x = matrix(isTall ? [80, 48] : [48, 80], 11)
      const data = await orthogonalize(x, await loadKernel(spec(triples, isTall)))
      const distance = relativeDistance(data, orthogonalizeBySvd(x, triples).data)
      t.ok(distance <= float32Tolerance, `distance ${distance}`)
      t.comment(`${name} ${isTall} ${distance}`)
    }
  })
}

for (const scale of [1e-30, 1e-22, 1e-12, 1e12, 1e22, 1e30]) {
  t.test(`a gradient of scale ${scale} gives the direction of scale 1`, async (t) => {
    const x = matrix([24, 40], 5, scale)
    const distance = relativeDistance(await orthogonalize(x), orthogonalizeBySvd(x, DEFAULT).data)
    t.ok(distance <= float32Tolerance, `distance ${distance}`)
  })
}

t.test('a power of two in the gradient or in gradient_scale changes no bit', async (t) => {
  const x = matrix([16, 24], 3)
  const expected = await orthogonalize(x)
  await fc.assert(
    fc.asyncProperty(fc.integer({ min: -100, max: 100 }), async (exponent) => {
      const scaled = { ...x, data: x.data.map((value) => value * 2 ** exponent) }
      t.same(await orthogonalize(scaled), expected)
      t.same(await orthogonalize(x, wide, { gradient_scale: 2 ** exponent }), expected)
    }),
    { numRuns: 20, seed: 1 },
  )
})

t.test('tall is the transpose of wide', async (t) => {
  await fc.assert(
    fc.asyncProperty(
      fc.integer({ min: 1, max: 24 }),
      fc.integer({ min: 1, max: 24 }),
      fc.nat(),
      async (rows, cols, seed) => {
        const x = matrix([rows, cols], seed)
        const transposed = transpose(x)
        const expected = transpose({ ...transposed, data: Float64Array.from(await orthogonalize(transposed, wide)) })
        const distance = relativeDistance(await orthogonalize(x, tall), expected.data)
        t.ok(distance <= float32Tolerance, `distance ${distance}`)
      },
    ),
    { numRuns: 20, seed: 2 },
  )
})

t.test('zero gives zero, whatever eps is', async (t) => {
  for (const eps of [0, 1e-7]) {
    for (const [x, run] of [
      [matrix([5, 9], 1, 0), wide],
      [matrix([9, 5], 1, 0), tall],
    ] as const) {
      t.ok((await orthogonalize(x, run, { eps })).every((value) => value === 0))
    }
  }
})

t.test('a rank-1 gradient keeps its direction and gets the gain p(1)', async (t) => {
  const [u, v] = [gaussian(1, 30), gaussian(2, 50)]
  const outer = Float64Array.from({ length: 1500 }, (_, i) => Math.fround(u[Math.floor(i / 50)] * v[i % 50]))
  const gain = composed(DEFAULT, 1) / frobenius(outer)
  const distance = relativeDistance(
    await orthogonalize({ rows: 30, cols: 50, data: outer }),
    outer.map((value) => value * gain),
  )
  // Rounding of the outer product adds directions of 1e-8, which the slope at 0 (about 485) lifts to 1e-5 each.
  t.ok(distance <= 1e-4, `distance ${distance}`)
})

t.test('output_scale multiplies the direction', async (t) => {
  const x = matrix([8, 8], 4)
  t.same(
    await orthogonalize(x, wide, { output_scale: -2 }),
    (await orthogonalize(x)).map((value) => value * -2),
  )
})

const FORMS = [
  { momentum_form: 'ema', nesterov: true },
  { momentum_form: 'ema', nesterov: false },
  { momentum_form: 'heavy_ball', nesterov: true },
  { momentum_form: 'heavy_ball', nesterov: false },
] as const

for (const form of FORMS) {
  t.test(
    `${form.momentum_form} momentum ${form.nesterov ? 'with' : 'without'} Nesterov: five steps and their replays`,
    async (t) => {
      const momentum = 0.95
      const weight = form.momentum_form === 'ema' ? 1 - momentum : 1
      const direction = form.nesterov ? { n_m: momentum, n_g: weight } : { n_m: 1, n_g: 0 }
      const first = { ...PLAIN, ...direction, c_m: momentum, c_g: weight }
      const dims = [12, 20] as const
      let buffer = new Float64Array(240)
      let state: Float32Array = new Float32Array(240)
      for (let step = 1; step <= 5; step++) {
        const { data: gradient } = matrix(dims, step)
        const expected = momentumStep(buffer, gradient, { ...form, momentum })
        const answer = await wide({ dims, gradient, state: { momentum_buffer: state }, scalars: first })
        const replayed = await wide({
          dims,
          gradient,
          state: { momentum_buffer: answer.momentum_buffer_next },
          scalars: { ...first, c_m: 1, c_g: 0 },
        })
        t.same(replayed, answer, 'a replay gives the same bits and moves nothing')
        t.ok(relativeDistance(answer.momentum_buffer_next, expected.buffer) <= 1e-6)
        const oracle = orthogonalizeBySvd({ rows: 12, cols: 20, data: expected.direction }, DEFAULT).data
        t.ok(relativeDistance(answer.data, oracle) <= float32Tolerance)
        buffer = expected.buffer
        state = answer.momentum_buffer_next
      }
    },
  )
}

t.test('magnitude is finite exactly when momentum and direction are', async (t) => {
  const cases: [string, Partial<typeof PLAIN>, number, boolean][] = [
    ['ordinary', {}, 1, true],
    ['the largest float32', {}, 3.4e38, true],
    ['a scaled gradient overflows', { gradient_scale: 1e30 }, 1e30, false],
    ['NaN in the gradient', {}, Number.NaN, false],
    ['infinity in the gradient', {}, Number.POSITIVE_INFINITY, false],
    ['the buffer overflows and the direction has no part of it', { c_g: 10, n_m: 0, n_g: 1 }, 3e38, false],
    ['only the direction overflows', { n_m: 10 }, 3e38, false],
  ]
  for (const [name, scalars, value, finite] of cases) {
    for (const index of [0, 7, 11]) {
      const gradient = new Float64Array(12).fill(1)
      gradient[index] = value
      const { magnitude } = await wide({ dims: [3, 4], gradient, scalars: { ...PLAIN, ...scalars } })
      t.equal(Number.isFinite(magnitude[0]), finite, `${name} at ${index}: ${magnitude[0]}`)
    }
  }
})
