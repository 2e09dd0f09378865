import t from 'tap'
import { type AdamwState, adamwStep, gaussian, relativeDistance, sgdStep } from '../reference.js'
import { loadKernel } from './session.js'

const FLOAT32 = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
const adamw = await loadKernel({ kind: 'adamw', ...FLOAT32 })
const sgd = await loadKernel({ kind: 'sgd', ...FLOAT32 })
const SIZE = 1000

function gradientOf(step: number): Float64Array {
  return gaussian(step, SIZE).map(Math.fround)
}

const ADAMW_OPTIONS = [
  { betas: [0.9, 0.999], eps: 1e-8 },
  { betas: [0, 0.95], eps: 1e-3 },
  { betas: [0.8, 0], eps: 0 },
] as const

for (const { betas, eps } of ADAMW_OPTIONS) {
  t.test(`adamw with betas ${betas} and eps ${eps} is within 1e-6 of float64 and replays bit for bit`, async (t) => {
    const [beta1, beta2] = betas
    let state: Record<string, ArrayLike<number>> = {}
    let exact: AdamwState = { exp_avg: new Float64Array(SIZE), exp_avg_sq: new Float64Array(SIZE) }
    for (let step = 1; step <= 5; step++) {
      const gradient = gradientOf(step)
      const fixed = { gradient_scale: 1, eps, bias1: 1 - beta1 ** step, bias2_sqrt: Math.sqrt(1 - beta2 ** step) }
      const first = { ...fixed, a_m: beta1, a_g: 1 - beta1, b_v: beta2, b_g: 1 - beta2 }
      const answer = await adamw({ dims: [SIZE], gradient, state, scalars: first })
      state = { exp_avg: answer.exp_avg_next, exp_avg_sq: answer.exp_avg_sq_next }
      const replay = { ...fixed, a_m: 1, a_g: 0, b_v: 1, b_g: 0 }
      t.same(await adamw({ dims: [SIZE], gradient, state, scalars: replay }), answer)
      const oracle = adamwStep(exact, gradient, { betas, eps, step })
      t.ok(relativeDistance(answer.data, oracle.data) <= 1e-6)
      t.ok(relativeDistance(answer.exp_avg_next, oracle.exp_avg) <= 1e-6)
      t.ok(relativeDistance(answer.exp_avg_sq_next, oracle.exp_avg_sq) <= 1e-6)
      exact = oracle
    }
  })
}

const ADAMW_FIRST = {
  gradient_scale: 1,
  a_m: 0.9,
  a_g: 0.1,
  b_v: 0.999,
  b_g: 0.001,
  bias1: 0.1,
  bias2_sqrt: Math.sqrt(0.001),
}

t.test('adamw with eps 0 answers a zero gradient with zero', async (t) => {
  const { data } = await adamw({ dims: [3], gradient: [0, 2, 0], scalars: { ...ADAMW_FIRST, eps: 0 } })
  t.equal(data[0], 0)
  t.ok(Math.abs(data[1] - 1) < 1e-6)
})

const SGD_OPTIONS = [
  { momentum: 0, dampening: 0, nesterov: false },
  { momentum: 0.9, dampening: 0, nesterov: false },
  { momentum: 0.9, dampening: 0.5, nesterov: false },
  { momentum: 0.9, dampening: 1, nesterov: false },
  { momentum: 0.9, dampening: 0, nesterov: true },
]

for (const options of SGD_OPTIONS) {
  t.test(`sgd ${JSON.stringify(options)} is torch's direction and replays bit for bit`, async (t) => {
    const { momentum, dampening, nesterov } = options
    const direction = nesterov ? { n_m: momentum, n_g: 1 } : { n_m: 1, n_g: 0 }
    let state: Record<string, ArrayLike<number>> = {}
    let exact: Float64Array | undefined
    for (let step = 1; step <= 5; step++) {
      const gradient = gradientOf(step)
      // torch's first buffer is the gradient itself, undampened.
      const first = {
        gradient_scale: 1,
        c_m: momentum,
        c_g: step === 1 || momentum === 0 ? 1 : 1 - dampening,
        ...direction,
      }
      const answer = await sgd({ dims: [SIZE], gradient, state, scalars: first })
      state = { momentum_buffer: answer.momentum_buffer_next }
      t.same(await sgd({ dims: [SIZE], gradient, state, scalars: { ...first, c_m: 1, c_g: 0 } }), answer)
      const oracle = sgdStep(exact, gradient, options)
      t.ok(relativeDistance(answer.data, oracle.data) <= 1e-6)
      exact = oracle.buffer
    }
  })
}

t.test('gradient_scale multiplies the gradient', async (t) => {
  const scalars = { gradient_scale: -0.5, c_m: 0, c_g: 1, n_m: 1, n_g: 0 }
  const { data } = await sgd({ dims: [3], gradient: [1, -2, 3], scalars })
  t.same([...data], [-0.5, 1, -1.5])
})

const SGD_FIRST = { gradient_scale: 1, c_m: 0.9, c_g: 1, n_m: 0.9, n_g: 1 }
const CHECKS: [string, number, object, { adamw: boolean; sgd: boolean }][] = [
  ['an ordinary gradient', 1, {}, { adamw: true, sgd: true }],
  ['a gradient whose square overflows', 1e25, {}, { adamw: false, sgd: true }],
  ['a scaled gradient that overflows', 1e20, { gradient_scale: 1e20 }, { adamw: false, sgd: false }],
  ['a direction that overflows', 3e38, {}, { adamw: false, sgd: false }],
  ['NaN', Number.NaN, {}, { adamw: false, sgd: false }],
  ['infinity', Number.NEGATIVE_INFINITY, {}, { adamw: false, sgd: false }],
  [
    'infinity that a coefficient of zero hides',
    Number.NEGATIVE_INFINITY,
    { c_g: 0, a_g: 0 },
    { adamw: false, sgd: false },
  ],
]

for (const [name, value, extra, finite] of CHECKS) {
  t.test(`magnitude is finite exactly when the next state is: ${name}, at any position`, async (t) => {
    for (const index of [0, 1, 17, 31]) {
      const gradient = new Float64Array(32).fill(1)
      gradient[index] = value
      const fromAdamw = await adamw({ dims: [32], gradient, scalars: { ...ADAMW_FIRST, eps: 1e-8, ...extra } })
      t.equal(Number.isFinite(fromAdamw.magnitude[0]), finite.adamw, `adamw ${fromAdamw.magnitude[0]} at ${index}`)
      const fromSgd = await sgd({ dims: [32], gradient, scalars: { ...SGD_FIRST, ...extra } })
      t.equal(Number.isFinite(fromSgd.magnitude[0]), finite.sgd, `sgd ${fromSgd.magnitude[0]} at ${index}`)
    }
  })
}
