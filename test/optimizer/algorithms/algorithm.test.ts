import t from 'tap'
import { kernelIo } from '../../../kernels/kernel.js'
import { buildKernel } from '../../../kernels/model.js'
import { NAMED_COEFFICIENTS } from '../../../kernels/orthogonalize/coefficients.js'
import { planStep } from '../../../src/optimizer/algorithms/algorithm.js'
import { adjustment } from '../../../src/optimizer/algorithms/muon.js'
import { parseGroup } from '../../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../../src/optimizer/parameter.js'
import type { At, Plan } from '../../../src/optimizer/plan.js'
import type { ParameterDeclaration } from '../../../src/wire/frame.js'

const FIRST: At = { step: 1, replay: false }
const LATER: At = { step: 7, replay: false }
const REPLAY: At = { step: 7, replay: true }

function plan(
  algorithm: string,
  hyperparameters: Record<string, unknown>,
  options: { layout?: Partial<ParameterDeclaration>; at?: At } = {},
): Plan {
  const group = parseGroup({ name: 'g', algorithm, ...hyperparameters })
  const [parameter] = parseParameters(
    [{ name: 'w', shape: [6, 4], group: 'g', ...options.layout }],
    new Map([['g', group]]),
  )
  return planStep(parameter, group, options.at ?? LATER)
}

t.test('a plan of muonclip is that of muon with the same values', async (t) => {
  const recipe = { momentum_form: 'heavy_ball', adjust_lr_fn: 'match_rms_adamw' }
  for (const at of [FIRST, LATER, REPLAY]) t.same(plan('muonclip', {}, { at }), plan('muon', recipe, { at }))
  t.throws(() => plan('muonclip', {}, { layout: { shape: [4] } }), { code: 'PARAMETER_INVALID' })
})

t.test('the momentum of muon is four scalars', async (t) => {
  const mu = 0.95
  const rest = 1 - mu
  const cases: [Record<string, unknown>, number[], number[]][] = [
    [{}, [mu, rest], [mu, rest]],
    [{ nesterov: false }, [mu, rest], [1, 0]],
    [{ momentum_form: 'heavy_ball' }, [mu, 1], [mu, 1]],
    [{ momentum_form: 'heavy_ball', nesterov: false }, [mu, 1], [1, 0]],
    [{ momentum: 0 }, [0, 1], [0, 1]],
  ]
  for (const [given, [c_m, c_g], [n_m, n_g]] of cases) {
    const what = JSON.stringify(given)
    t.same(plan('muon', given).scalars, { c_m, c_g, n_m, n_g, eps: 1e-7, output_scale: 1 }, what)
    t.same(plan('muon', given, { at: FIRST }), plan('muon', given), `${what}: the first step is as any other`)
    const replay = plan('muon', given, { at: REPLAY })
    t.same(
      replay.scalars,
      { c_m: 1, c_g: 0, n_m, n_g, eps: 1e-7, output_scale: 1 },
      `${what}: a replay leaves the buffer`,
    )
    t.same({ ...replay, scalars: {} }, { ...plan('muon', given), scalars: {} })
  }
})

t.test('adjust_lr_fn is a function of the rows and cols of a matrix', async (t) => {
  const cases: [Parameters<typeof adjustment>[0], (rows: number, cols: number) => number][] = [
    ['original', (rows, cols) => Math.sqrt(Math.max(1, rows / cols))],
    ['match_rms_adamw', (rows, cols) => 0.2 * Math.sqrt(Math.max(rows, cols))],
    ['rms:0.18', (rows, cols) => 0.18 * Math.sqrt(Math.max(rows, cols))],
    ['rms:2.5e-1', (rows, cols) => 0.25 * Math.sqrt(Math.max(rows, cols))],
    ['spectral', (rows, cols) => Math.sqrt(rows / cols)],
    ['none', () => 1],
  ]
  for (const [adjust_lr_fn, f] of cases) {
    for (const [rows, cols] of [
      [1, 1],
      [16, 4],
      [4, 16],
      [1, 9],
      [9, 1],
      [768, 3072],
    ]) {
      t.equal(adjustment(adjust_lr_fn, rows, cols), f(rows, cols), `${adjust_lr_fn} of ${rows}x${cols}`)
      const { scale, decay, rms_factor, tasks } = plan(
        'muon',
        { adjust_lr_fn, lr: 0.02, weight_decay: 0.5 },
        { layout: { shape: [rows, cols] } },
      )
      t.same({ scale, decay, rms_factor }, { scale: -0.02 * f(rows, cols), decay: 0.01, rms_factor: f(rows, cols) })
      t.same(tasks, [{ dims: [rows, cols], offset: 0 }])
    }
  }
})

t.test('blocks with one factor share it in scale', async (t) => {
  const wide = { shape: [12, 2], heads: 3 }
  const { scale, rms_factor, scalars, tasks } = plan('muon', { lr: 1 }, { layout: wide })
  t.equal(scale, -Math.sqrt(2))
  t.equal(rms_factor, Math.sqrt(2))
  t.equal(scalars.output_scale, 1)
  t.same(
    tasks,
    [0, 8, 16].map((offset) => ({ dims: [4, 2], offset })),
  )
  const same = plan('muon', { lr: 1 }, { layout: { shape: [6, 4], split: [2, 4] } })
  t.match(same, { scale: -1, rms_factor: 1, scalars: { output_scale: 1 } }, 'two shapes whose factors are equal')
})

t.test('blocks with different factors carry theirs in the data', async (t) => {
  const layout = { shape: [20, 4], split: [16, 4] }
  const split = plan('muon', { lr: 0.5, weight_decay: 0.1 }, { layout })
  t.equal(split.scale, -0.5)
  t.equal(split.decay, 0.05)
  t.equal(split.rms_factor, 1)
  t.notHas(split.scalars, { output_scale: 1 })
  t.same(split.tasks, [
    { dims: [16, 4], offset: 0, output_scale: 2 },
    { dims: [4, 4], offset: 64, output_scale: 1, kernel: { ...split.kernel, tall: false } },
  ])
  for (const adjust_lr_fn of ['match_rms_adamw', 'rms:0.18', 'spectral'] as const) {
    const { tasks } = plan('muon', { adjust_lr_fn }, { layout })
    t.same(
      tasks.map((task) => task.output_scale),
      [adjustment(adjust_lr_fn, 16, 4), adjustment(adjust_lr_fn, 4, 4)],
    )
  }
  t.match(plan('muon', { adjust_lr_fn: 'none' }, { layout }), { scalars: { output_scale: 1 }, rms_factor: 1 })
  t.same(
    plan('muon', { lr: 0.5, weight_decay: 0.1 }, { layout, at: REPLAY }).tasks,
    split.tasks,
    'a replay has the same factors',
  )
})

t.test('each block has the kernel of its orientation', async (t) => {
  const tall = (shape: number[], layout: Partial<ParameterDeclaration> = {}) => {
    const { kernel, tasks } = plan('muon', {}, { layout: { shape, ...layout } })
    return tasks.map((task) => {
      const own = task.kernel ?? kernel
      return own.kind === 'muon' && own.tall
    })
  }
  t.same(tall([6, 4]), [true])
  t.same(tall([4, 6]), [false])
  t.same(tall([4, 4]), [false], 'a square is not tall')
  t.same(tall([8, 4], { split: [1, 7] }), [false, true])
  t.same(tall([8, 4], { split: [7, 1] }), [true, false])
  t.same(tall([2, 8, 4], { matrices: 'batch' }), [true, true])
})

t.test('the kernel of muon has a triple for each iteration and the dtypes of the parameter', async (t) => {
  const layout = { gradient_dtype: 'bfloat16', update_dtype: 'float16' }
  t.same(plan('muon', { ns_steps: 2, ns_coefficients: [2, -1.5, 0.5] }, { layout }).kernel, {
    kind: 'muon',
    coefficients: [
      [2, -1.5, 0.5],
      [2, -1.5, 0.5],
    ],
    tall: true,
    ...layout,
  })
  const named = plan('muon', { ns_coefficients: 'deepseek_v4' }).kernel
  t.same(named.kind === 'muon' && named.coefficients, NAMED_COEFFICIENTS.deepseek_v4.coefficients)
  for (const kind of ['adamw', 'rmsprop', 'sgd']) t.same(plan(kind, {}, { layout }).kernel, { kind, ...layout })
  t.same(plan('adam', {}, { layout }).kernel, { kind: 'adamw', ...layout })
  t.same(plan('adam', { amsgrad: true }, { layout }).kernel, { kind: 'adamw', amsgrad: true, ...layout })
  t.match(plan('muon', { momentum_dtype: 'bfloat16' }).kernel, { momentum_dtype: 'bfloat16' })
})

t.test('the second momentum has a place for each matrix and goes by its longer side', async (t) => {
  const normuon = { second_momentum: 'normuon', beta2: 0.75, adjust_lr_fn: 'none' }
  const layout = { shape: [2, 11, 4], matrices: 'batch', split: [6, 4, 1] }
  const { kernel, tasks, scalars } = plan('muon', normuon, { layout })
  t.match(scalars, { b_v: 0.75, b_g: 0.25 })
  t.match(kernel, { tall: true, second_momentum: 'row' })
  t.same(
    tasks.map(({ line_offset }) => line_offset),
    [0, 6, 10, 14, 20, 24],
  )
  const own = tasks.slice(0, 3).map((task) => task.kernel ?? kernel)
  t.match(own, [
    { tall: true, second_momentum: 'row' },
    { tall: false, second_momentum: 'row' },
    { tall: false, second_momentum: 'col' },
  ])
  t.equal(tasks[1].kernel, tasks[4].kernel, 'one kernel for all that lie the same way')
  t.match(plan('muon', normuon, { layout, at: REPLAY }).scalars, { b_v: 1, b_g: 0 })
  t.notMatch(plan('muon', { beta2: 0.75 }, { layout }).tasks[0], { line_offset: 0 })
  t.notMatch(plan('muon', { beta2: 0.75 }, { layout }).scalars, { b_v: 0.75 })
})

t.test('adam is adamw without decay', async (t) => {
  const options = { lr: 0.5, betas: [0.8, 0.99], eps: 1e-6 }
  for (const at of [FIRST, LATER, REPLAY]) {
    t.same(plan('adam', options, { at }), plan('adamw', { ...options, weight_decay: 0 }, { at }))
  }
})

t.test('rmsprop averages squares, and its buffer takes whole steps', async (t) => {
  const given = { lr: 0.5, alpha: 0.75, eps: 1e-6, momentum: 0.25 }
  const { scalars, ...rest } = plan('rmsprop', given, { layout: { shape: [2, 3] } })
  t.same(scalars, { b_v: 0.75, b_g: 0.25, c_m: 0.25, c_g: 1, eps: 1e-6 })
  t.match(rest, { tasks: [{ dims: [6], offset: 0 }], scale: -0.5, decay: 0, rms_factor: 1 })
  t.same(plan('rmsprop', given, { at: REPLAY }).scalars, { b_v: 1, b_g: 0, c_m: 1, c_g: 0, eps: 1e-6 })
})

t.test("adamw corrects the bias with the parameter's own step", async (t) => {
  for (const step of [1, 2, 1000]) {
    const at = { step, replay: false }
    const { scalars, ...rest } = plan(
      'adamw',
      { lr: 0.5, weight_decay: 0.25, betas: [0.8, 0.99], eps: 1e-6 },
      { at, layout: { shape: [2, 3, 4] } },
    )
    const bias = { bias1: 1 - 0.8 ** step, bias2_sqrt: Math.sqrt(1 - 0.99 ** step), eps: 1e-6 }
    t.same(scalars, { a_m: 0.8, a_g: 1 - 0.8, b_v: 0.99, b_g: 1 - 0.99, ...bias })
    t.match(rest, { tasks: [{ dims: [24], offset: 0 }], scale: -0.5, decay: 0.125, rms_factor: 1 })
    const replay = plan('adamw', { betas: [0.8, 0.99], eps: 1e-6 }, { at: { step, replay: true } })
    t.same(replay.scalars, { a_m: 1, a_g: 0, b_v: 1, b_g: 0, ...bias })
  }
  t.match(plan('adamw', { betas: [0, 0] }, { at: FIRST }).scalars, { a_g: 1, b_g: 1, bias1: 1, bias2_sqrt: 1 })
  t.ok(plan('adamw', { betas: [1 - 2 ** -53, 1 - 2 ** -53] }, { at: FIRST }).scalars.bias1 > 0, 'no division by zero')
})

t.test('sgd dampens from the second step on, and only where there is momentum', async (t) => {
  const cases: [Record<string, unknown>, At, number[], number[]][] = [
    [{}, FIRST, [1, 0], [0, 1]],
    [{}, LATER, [1, 0], [0, 1]],
    [{}, REPLAY, [1, 0], [0, 1]],
    [{ dampening: 0.5 }, LATER, [1, 0], [0, 1]],
    [{ momentum: 0.75 }, LATER, [0.75, 1], [1, 0]],
    [{ momentum: 0.75, dampening: 0.5 }, FIRST, [0.75, 1], [1, 0]],
    [{ momentum: 0.75, dampening: 0.5 }, { step: 2, replay: false }, [0.75, 0.5], [1, 0]],
    [{ momentum: 0.75, dampening: 0.5 }, REPLAY, [1, 0], [1, 0]],
    [{ momentum: 0.75, nesterov: true }, FIRST, [0.75, 1], [0.75, 1]],
    [{ momentum: 0.75, nesterov: true }, LATER, [0.75, 1], [0.75, 1]],
    [{ momentum: 0.75, nesterov: true }, REPLAY, [1, 0], [0.75, 1]],
  ]
  for (const [given, at, [c_m, c_g], [n_m, n_g]] of cases) {
    t.same(plan('sgd', given, { at }).scalars, { c_m, c_g, n_m, n_g }, JSON.stringify({ given, at }))
  }
  const { tasks, scale, decay, rms_factor } = plan('sgd', { lr: 0.7, weight_decay: 0.1 }, { layout: { shape: [] } })
  t.same(
    { tasks, scale, decay, rms_factor },
    { tasks: [{ dims: [1], offset: 0 }], scale: -0.7, decay: 0.7 * 0.1, rms_factor: 1 },
  )
})

t.test('at lr 0 the factors are zero and not minus zero, and the RMS keeps its factor', async (t) => {
  for (const algorithm of ['muon', 'adamw', 'sgd']) {
    const { scale, decay, rms_factor } = plan(algorithm, { lr: 0, weight_decay: 1 }, { layout: { shape: [16, 4] } })
    t.ok(Object.is(scale, 0) && Object.is(decay, 0))
    t.equal(rms_factor, algorithm === 'muon' ? 2 : 1)
  }
})

t.test('a plan gives each scalar of its kernel but gradient_scale, and a kernel that builds', async (t) => {
  for (const [algorithm, options] of [
    ['muon', {}],
    ['muon', { second_momentum: 'normuon', momentum_dtype: 'bfloat16' }],
    ['adamw', {}],
    ['adam', { amsgrad: true }],
    ['rmsprop', {}],
    ['sgd', {}],
  ] as const) {
    const { kernel, scalars } = plan(algorithm, options)
    t.same(
      Object.keys(scalars).sort(),
      kernelIo(kernel)
        .scalars.filter((name) => name !== 'gradient_scale')
        .sort(),
    )
    t.ok(buildKernel(kernel).length > 0)
  }
})

t.test('no algorithm is left without a plan', async (t) => {
  const group = parseGroup({ name: 'g', algorithm: 'sgd' })
  const [parameter] = parseParameters([{ name: 'w', shape: [1], group: 'g' }], new Map([['g', group]]))
  t.throws(() => planStep(parameter, { name: 'g', algorithm: 'other' } as never, FIRST), /no plan for .*other/)
})
