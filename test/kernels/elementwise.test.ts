import t from 'tap'
import {
  type AdamwState,
  type AmsgradState,
  adamwStep,
  amsgradStep,
  gaussian,
  type RmspropState,
  relativeDistance,
  rmspropStep,
  sgdStep,
} from '../reference.js'
import { loadKernel } from './session.js'

const FLOAT32 = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
const adamw = await loadKernel({ kind: 'adamw', ...FLOAT32 })
const amsgrad = await loadKernel({ kind: 'adamw', amsgrad: true, ...FLOAT32 })
const rmsprop = await loadKernel({ kind: 'rmsprop', ...FLOAT32 })
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

t.test('amsgrad divides by the largest second average so far, and replays bit for bit', async (t) => {
  const betas = [0.5, 0.6] as const
  const eps = 1e-8
  let state: Record<string, ArrayLike<number>> = {}
  let exact: AmsgradState = {
    exp_avg: new Float64Array(SIZE),
    exp_avg_sq: new Float64Array(SIZE),
    max_exp_avg_sq: new Float64Array(SIZE),
  }
  let held = 0
  for (let step = 1; step <= 6; step++) {
    const gradient = gradientOf(step).map((value) => Math.fround(value / step))
    const fixed = { gradient_scale: 1, eps, bias1: 1 - betas[0] ** step, bias2_sqrt: Math.sqrt(1 - betas[1] ** step) }
    const first = { ...fixed, a_m: betas[0], a_g: 1 - betas[0], b_v: betas[1], b_g: 1 - betas[1] }
    const answer = await amsgrad({ dims: [SIZE], gradient, state, scalars: first })
    state = {
      exp_avg: answer.exp_avg_next!,
      exp_avg_sq: answer.exp_avg_sq_next!,
      max_exp_avg_sq: answer.max_exp_avg_sq_next!,
    }
    const replay = { ...fixed, a_m: 1, a_g: 0, b_v: 1, b_g: 0 }
    t.same(await amsgrad({ dims: [SIZE], gradient, state, scalars: replay }), answer)
    const oracle = amsgradStep(exact, gradient, { betas, eps, step })
    t.ok(relativeDistance(answer.data!, oracle.data) <= 1e-6)
    t.ok(relativeDistance(answer.max_exp_avg_sq_next!, oracle.max_exp_avg_sq) <= 1e-6)
    held = oracle.max_exp_avg_sq.filter((value, i) => value > oracle.exp_avg_sq[i]!).length
    exact = oracle
  }
  t.ok(held > SIZE / 4, `${held} elements hold a maximum of an earlier step`)
})

const RMSPROP_OPTIONS = [
  { alpha: 0.99, eps: 1e-8, momentum: 0 },
  { alpha: 0.9, eps: 1e-3, momentum: 0.9 },
  { alpha: 0, eps: 0, momentum: 0.5 },
]

for (const options of RMSPROP_OPTIONS) {
  t.test(`rmsprop ${JSON.stringify(options)} is within 1e-6 of float64 and replays bit for bit`, async (t) => {
    const { alpha, eps, momentum } = options
    const first = { gradient_scale: 1, b_v: alpha, b_g: 1 - alpha, c_m: momentum, c_g: 1, eps }
    let state: Record<string, ArrayLike<number>> = {}
    let exact: RmspropState = { square_avg: new Float64Array(SIZE), momentum_buffer: new Float64Array(SIZE) }
    for (let step = 1; step <= 5; step++) {
      const gradient = gradientOf(step)
      const answer = await rmsprop({ dims: [SIZE], gradient, state, scalars: first })
      state = { square_avg: answer.square_avg_next!, momentum_buffer: answer.momentum_buffer_next! }
      const replay = { ...first, b_v: 1, b_g: 0, c_m: 1, c_g: 0 }
      t.same(await rmsprop({ dims: [SIZE], gradient, state, scalars: replay }), answer)
      const oracle = rmspropStep(exact, gradient, options)
      t.ok(relativeDistance(answer.data!, oracle.data) <= 1e-6)
      t.ok(relativeDistance(answer.square_avg_next!, oracle.square_avg) <= 1e-6)
      exact = oracle
    }
  })
}

t.test('rmsprop with eps 0 answers a zero gradient with zero', async (t) => {
  const scalars = { gradient_scale: 1, b_v: 0.99, b_g: 0.01, c_m: 0, c_g: 1, eps: 0 }
  const { data } = await rmsprop({ dims: [3], gradient: [0, 2, 0], scalars })
  t.equal(data![0], 0)
  t.ok(Math.abs(data![1]! - 10) < 1e-5)
})

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
    const without = { c_m: 1, c_g: 0, n_m: 0, n_g: 1 }
    let state: Record<string, ArrayLike<number>> = {}
    let exact: Float64Array | undefined
    for (let step = 1; step <= 5; step++) {
      const gradient = gradientOf(step)
      // torch's first buffer is the gradient itself, undampened.
      const first = {
        gradient_scale: 1,
        c_m: momentum,
        c_g: step === 1 ? 1 : 1 - dampening,
        ...direction,
        ...(momentum === 0 && without),
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
const RMSPROP_FIRST = { gradient_scale: 1, b_v: 0.99, b_g: 0.01, c_m: 0.9, c_g: 1, eps: 1e-8 }
const CHECKS: [string, number, object, { adamw: boolean; rmsprop: boolean; sgd: boolean }][] = [
  ['an ordinary gradient', 1, {}, { adamw: true, rmsprop: true, sgd: true }],
  ['a gradient whose square overflows', 1e25, {}, { adamw: false, rmsprop: false, sgd: true }],
  ['a scaled gradient that overflows', 1e20, { gradient_scale: 1e20 }, { adamw: false, rmsprop: false, sgd: false }],
  ['a direction that overflows', 3e38, {}, { adamw: false, rmsprop: false, sgd: false }],
  ['NaN', Number.NaN, {}, { adamw: false, rmsprop: false, sgd: false }],
  ['infinity', Number.NEGATIVE_INFINITY, {}, { adamw: false, rmsprop: false, sgd: false }],
  [
    'infinity that a coefficient of zero hides',
    Number.NEGATIVE_INFINITY,
    { c_g: 0, a_g: 0 },
    { adamw: false, rmsprop: false, sgd: false },
  ],
]

for (const [name, value, extra, finite] of CHECKS) {
  t.test(`magnitude is finite exactly when the next state is: ${name}, at any position`, async (t) => {
    for (const index of [0, 1, 17, 31]) {
      const gradient = new Float64Array(32).fill(1)
      gradient[index] = value
      const fromAdamw = await adamw({ dims: [32], gradient, scalars: { ...ADAMW_FIRST, eps: 1e-8, ...extra } })
      t.equal(Number.isFinite(fromAdamw.magnitude[0]), finite.adamw, `adamw ${fromAdamw.magnitude[0]} at ${index}`)
      const fromAmsgrad = await amsgrad({ dims: [32], gradient, scalars: { ...ADAMW_FIRST, eps: 1e-8, ...extra } })
      t.equal(Number.isFinite(fromAmsgrad.magnitude![0]), finite.adamw, `amsgrad at ${index}`)
      const fromRmsprop = await rmsprop({ dims: [32], gradient, scalars: { ...RMSPROP_FIRST, ...extra } })
      t.equal(Number.isFinite(fromRmsprop.magnitude![0]), finite.rmsprop, `rmsprop at ${index}`)
      const fromSgd = await sgd({ dims: [32], gradient, scalars: { ...SGD_FIRST, ...extra } })
      t.equal(Number.isFinite(fromSgd.magnitude[0]), finite.sgd, `sgd ${fromSgd.magnitude[0]} at ${index}`)
    }
  })
}

t.test('a buffer of rmsprop that overflows is told, though the average of squares is finite', async (t) => {
  const state = { square_avg: [1, 1], momentum_buffer: [0, 3e38] }
  for (const [c_m, finite] of [
    [0.9, true],
    [2, false],
  ] as const) {
    const { magnitude } = await rmsprop({ dims: [2], gradient: [1, 1], state, scalars: { ...RMSPROP_FIRST, c_m } })
    t.equal(Number.isFinite(magnitude![0]), finite)
  }
})
