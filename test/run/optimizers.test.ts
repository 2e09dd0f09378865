import t, { type Test } from 'tap'
import { expandCoefficients, NAMED_COEFFICIENTS } from '../../kernels/orthogonalize/coefficients.js'
import { parseSafetensors, type StoredTensor } from '../../src/store/safetensors.js'
import {
  adamwStep,
  amsgradStep,
  type MomentumOptions,
  momentumStep,
  normuonStep,
  orthogonalizeByIteration,
  relativeDistance,
  rmspropStep,
  sgdStep,
} from '../reference.js'
import { normal, RawClient, type ReceivedUpdate, type Service, startService, until } from '../service.js'

const STEPS = 20
const COEFFICIENTS = expandCoefficients(NAMED_COEFFICIENTS.keller_jordan.coefficients, 5)

let service: Service
t.before(async () => {
  service = await startService()
})
t.teardown(() => service.app.close())

type State = Record<string, Float64Array>
type Input = {
  step: number
  gradient: Float64Array
  /** The state that the service has after the step, read over REST. */
  kept: State
}
/** A step in float64: the update's data, and the state that the service must have, unless `kept` is taken as right. */
type Oracle = (input: Input) => { data: Float64Array; state: State }
/** A case; `factor` is f, 1 unless given: scale is -lr·f. */
type Case = { name: string; shape: number[]; group: Record<string, unknown>; factor?: number; oracle: () => Oracle }

const LR = 0.25
const WEIGHT_DECAY = 0.5
/** Algorithms whose decay torch adds to the gradient, which needs the weights. */
const WITHOUT_DECAY = ['adam', 'rmsprop']

const zeros = (count: number) => new Float64Array(count)
const count = (shape: readonly number[]) => shape.reduce((product, size) => product * size, 1)

function muonCase(name: string, [rows, cols]: readonly [number, number], options: Record<string, unknown> = {}): Case {
  const { momentum, nesterov, momentum_form, momentum_dtype, second_momentum, beta2 } = {
    ...{ momentum: 0.95, nesterov: true, momentum_form: 'ema', momentum_dtype: 'float32' },
    ...{ second_momentum: 'none', beta2: 0.95 },
    ...options,
  }
  const settings = { momentum, nesterov, momentum_form } as MomentumOptions
  const narrow = momentum_dtype === 'bfloat16'
  const oracle = (): Oracle => {
    let buffer: Float64Array = zeros(rows * cols)
    let second: Float64Array = zeros(Math.max(rows, cols))
    return ({ gradient, kept }) => {
      const exact = momentumStep(buffer, gradient, settings)
      buffer = narrow ? kept.momentum_buffer! : exact.buffer
      const share = momentum_form === 'ema' ? 1 - momentum : 1
      const direction = buffer.map((b, i) => (nesterov ? momentum * b + share * gradient[i]! : b))
      const o = orthogonalizeByIteration({ rows, cols, data: direction }, COEFFICIENTS)
      const state: State = narrow ? {} : { momentum_buffer: buffer }
      if (second_momentum === 'none') return { data: o.data, state }
      const evened = normuonStep(second, o, beta2)
      second = evened.second
      return { data: evened.data, state: { ...state, second_momentum: second } }
    }
  }
  return { name, shape: [rows, cols], group: { algorithm: 'muon', adjust_lr_fn: 'none', ...options }, oracle }
}

function adamCase(algorithm: 'adam' | 'adamw', options: Record<string, unknown> = {}): Case {
  const { betas, eps, amsgrad } = { betas: [0.9, 0.999], eps: 1e-8, amsgrad: false, ...options } as {
    betas: [number, number]
    eps: number
    amsgrad: boolean
  }
  const shape = [7, 31]
  const oracle = (): Oracle => {
    let [exp_avg, exp_avg_sq, max_exp_avg_sq]: Float64Array[] = [zeros(217), zeros(217), zeros(217)]
    return ({ step, gradient }) => {
      const before = { exp_avg: exp_avg!, exp_avg_sq: exp_avg_sq!, max_exp_avg_sq: max_exp_avg_sq! }
      const { data, ...state } = (amsgrad ? amsgradStep : adamwStep)(before, gradient, { betas, eps, step })
      exp_avg = state.exp_avg
      exp_avg_sq = state.exp_avg_sq
      if ('max_exp_avg_sq' in state) max_exp_avg_sq = state.max_exp_avg_sq as Float64Array
      return { data, state }
    }
  }
  const name = `${algorithm} ${JSON.stringify(options)}`
  return { name, shape, group: { algorithm, ...options }, oracle }
}

function rmspropCase(options: Record<string, unknown> = {}): Case {
  const settings = { alpha: 0.99, eps: 1e-8, momentum: 0, ...options }
  const oracle = (): Oracle => {
    let state = { square_avg: zeros(101), momentum_buffer: zeros(101) }
    return ({ gradient }) => {
      const { data, ...next } = rmspropStep(state, gradient, settings)
      state = next as typeof state
      return { data, state: next }
    }
  }
  return {
    name: `rmsprop ${JSON.stringify(options)}`,
    shape: [101],
    group: { algorithm: 'rmsprop', ...options },
    oracle,
  }
}

function sgdCase(options: Record<string, unknown> = {}): Case {
  const settings = { momentum: 0, dampening: 0, nesterov: false, ...options }
  const oracle = (): Oracle => {
    let buffer: Float64Array | undefined
    return ({ gradient }) => {
      const { data, buffer: next } = sgdStep(buffer, gradient, settings)
      // Without momentum torch keeps no buffer; the service keeps the zeros of the beginning.
      buffer = settings.momentum === 0 ? zeros(gradient.length) : next
      return { data, state: { momentum_buffer: buffer } }
    }
  }
  return { name: `sgd ${JSON.stringify(options)}`, shape: [3, 5, 7], group: { algorithm: 'sgd', ...options }, oracle }
}

const NORMUON = { second_momentum: 'normuon' }
const BFLOAT16 = { momentum_dtype: 'bfloat16' }
// muonclip without hyperparameters, to test its own defaults.
const MUONCLIP = { name: 'muonclip', group: { algorithm: 'muonclip' }, factor: 0.2 * Math.sqrt(30) }
const CASES: Case[] = [
  muonCase('muon', [20, 30]),
  muonCase('muon heavy_ball', [30, 20], { momentum_form: 'heavy_ball' }),
  muonCase('muon without nesterov', [20, 30], { nesterov: false }),
  muonCase('muon normuon, wide', [20, 30], NORMUON),
  muonCase('muon normuon, tall, beta2 0.5', [30, 20], { ...NORMUON, beta2: 0.5 }),
  muonCase('muon normuon, square', [24, 24], NORMUON),
  muonCase('muon normuon, one row', [1, 30], NORMUON),
  muonCase('muon normuon, one column', [30, 1], NORMUON),
  muonCase('muon bfloat16', [20, 30], BFLOAT16),
  muonCase('muon bfloat16 heavy_ball without nesterov', [30, 20], {
    ...BFLOAT16,
    momentum_form: 'heavy_ball',
    nesterov: false,
  }),
  muonCase('muon normuon bfloat16', [20, 30], { ...NORMUON, ...BFLOAT16 }),
  { ...muonCase('', [20, 30], { momentum_form: 'heavy_ball' }), ...MUONCLIP },
  adamCase('adamw'),
  adamCase('adamw', { amsgrad: true, betas: [0.8, 0.9] }),
  adamCase('adam'),
  adamCase('adam', { amsgrad: true, betas: [0.5, 0.7], eps: 1e-3 }),
  rmspropCase(),
  rmspropCase({ momentum: 0.9, alpha: 0.9, eps: 1e-4 }),
  sgdCase(),
  sgdCase({ momentum: 0.9, dampening: 0.3 }),
  sgdCase({ momentum: 0.9, nesterov: true }),
]

/** Trains one parameter, sends every gradient twice and reads the state over REST. */
async function* train(run: string, { shape, group }: Omit<Case, 'name' | 'oracle'>, gradients: Iterable<Float32Array>) {
  const client = await RawClient.connect(service.url)
  await client.open({
    run,
    groups: [{ name: 'g', algorithm: '', ...group }],
    parameters: [{ name: 'p', shape, group: 'g' }],
  })
  const answer = async (step: number, values: Float32Array): Promise<ReceivedUpdate> => {
    client.updates.delete(0)
    client.gradient(0, step, { values })
    await until(() => client.updates.get(0)?.data.length === values.byteLength)
    return client.updates.get(0)!
  }
  let step = 0
  for (const values of gradients) {
    step += 1
    const [first, again] = [await answer(step, values), await answer(step, values)]
    client.send({ type: 'end', step })
    await client.expect('receipt')
    const response = await fetch(`${service.http}/v1/runs/${run}/parameters/0/state`)
    const { tensors } = parseSafetensors(Buffer.from(await response.arrayBuffer()))
    yield { step, values, first, again, tensors }
  }
  await client.close()
  await fetch(`${service.http}/v1/runs/${run}`, { method: 'DELETE' })
}

function numbers({ dtype, data }: StoredTensor): Float64Array {
  const copy = Uint8Array.from(data).buffer
  if (dtype === 'F32') return Float64Array.from(new Float32Array(copy))
  return Float64Array.from(new Float32Array(Uint32Array.from(new Uint16Array(copy), (half) => half << 16).buffer))
}

const stateOf = (tensors: Map<string, StoredTensor>): State =>
  Object.fromEntries([...tensors].filter(([name]) => name !== 'step').map(([name, tensor]) => [name, numbers(tensor)]))

for (const [index, { name, shape, factor = 1, oracle, ...given }] of CASES.entries()) {
  t.test(`${name}: 20 steps are float64's within 1e-5, and a repeated gradient gets the same bits`, async (t) => {
    const next = oracle()
    const weight_decay = WITHOUT_DECAY.includes(String(given.group.algorithm)) ? 0 : WEIGHT_DECAY
    const group = { lr: LR, weight_decay, ...given.group }
    const gradients = Array.from({ length: STEPS }, (_, i) => normal(100 * index + i, count(shape)))
    for await (const { step, values, first, again, tensors } of train(`case-${index}`, { shape, group }, gradients)) {
      t.match(first, { scale: -LR * factor, decay: LR * weight_decay })
      const kept = stateOf(tensors)
      const { data, state } = next({ step, gradient: Float64Array.from(values), kept })
      const distance = relativeDistance(floats(first.data), data)
      t.ok(distance <= 1e-5, `step ${step}: update ${distance}`)
      t.equal(Buffer.compare(again.data, first.data), 0, 'the replay is the same bits')
      t.match([first.replayed, again.replayed], [false, true])
      for (const [key, values] of Object.entries(state)) {
        const distance = relativeDistance(kept[key]!, values)
        t.ok(distance <= 1e-5, `step ${step}: ${key} ${distance}`)
      }
    }
  })
}

const floats = (data: Uint8Array) => new Float32Array(Uint8Array.from(data).buffer)

t.test('sgd leaves its buffer alone while momentum is 0, so a schedule may turn it on and off', async (t) => {
  const client = await RawClient.connect(service.url)
  const parameters = [{ name: 'p', shape: [17], group: 'g' }]
  await client.open({ run: 'schedule', groups: [{ name: 'g', algorithm: 'sgd', lr: 1 }], parameters })
  let buffer: Float64Array | undefined
  for (const [i, momentum] of [0, 0, 0.9, 0.9, 0, 0.5, 0].entries()) {
    const [step, gradient] = [i + 1, normal(i, 17)]
    client.send({ type: 'step', step, groups: { g: { momentum } } })
    await client.step(step, [gradient])
    // torch makes its buffer at the first step with momentum, and changes it in no step without.
    const expected = sgdStep(buffer, Float64Array.from(gradient), { momentum, dampening: 0, nesterov: false })
    if (momentum > 0) buffer = expected.buffer
    const first = client.updates.get(0)!
    const distance = relativeDistance(floats(first.data), expected.data)
    t.ok(distance <= 1e-6, `step ${step}, momentum ${momentum}: ${distance}`)
    client.updates.clear()
    client.gradient(0, step, { values: gradient })
    await until(() => client.updates.get(0)?.data.length === first.data.length)
    t.same(client.updates.get(0), { ...first, replayed: true })
  }
  await client.close()
})

/** A number rounded to bfloat16, ties to even. */
function bfloat16(x: number): number {
  const [word] = new Uint32Array(Float32Array.of(x).buffer)
  const rounded = (word! + 0x7fff + ((word! >>> 16) & 1)) & 0xffff0000
  return new Float32Array(Uint32Array.of(rounded).buffer)[0]!
}

async function checkRounding(t: Test, options: Record<string, unknown>): Promise<void> {
  const shape = [40, 30]
  const gradients = Array.from({ length: 5 }, (_, i) => normal(i, 1200))
  let before = zeros(1200)
  for await (const { values, tensors } of train('rounding', { shape, group: options }, gradients)) {
    const tensor = tensors.get('momentum_buffer')!
    t.match(tensor, { dtype: 'BF16', shape })
    const kept = numbers(tensor)
    const wrong = kept.filter((b, i) => {
      const [old, g] = [0.95 * before[i]!, 0.05 * values[i]!]
      // The float32 sum may lie on the other side of a tie than the float64 one.
      const slack = 2 ** -22 * (Math.abs(old) + Math.abs(g))
      return ![old + g - slack, old + g + slack].map(bfloat16).includes(b)
    })
    t.equal(wrong.length, 0, `${wrong}`)
    before = Float64Array.from(kept)
  }
}

t.test('a bfloat16 buffer is rounded to nearest in every step', (t) =>
  checkRounding(t, { algorithm: 'muon', ...BFLOAT16 }),
)

t.test('a bfloat16 buffer rounds ties to even', async (t) => {
  const gradients = [Float32Array.of(1 + 2 ** -8, 1 + 3 * 2 ** -8, -1 - 2 ** -8, 1 + 2 ** -8 + 2 ** -20)]
  const group = { algorithm: 'muon', momentum: 0, ...BFLOAT16 }
  for await (const { tensors } of train('ties', { shape: [2, 2], group }, gradients)) {
    t.same([...numbers(tensors.get('momentum_buffer')!)], [1, 1 + 2 ** -6, -1, 1 + 2 ** -7])
  }
})

t.test('a bfloat16 buffer that overflows refuses the gradient, and the state stays', async (t) => {
  const client = await RawClient.connect(service.url)
  const groups = [{ name: 'g', algorithm: 'muon', momentum: 0, ...BFLOAT16 }]
  await client.open({ run: 'overflow', groups, parameters: [{ name: 'p', shape: [1, 2], group: 'g' }] })
  client.gradient(0, 1, { values: Float32Array.of(1, 3.4e38) })
  t.match(await client.expect('error'), { code: 'GRADIENT_NOT_FINITE' })
  client.gradient(0, 1, { values: Float32Array.of(1, 3.3e38) })
  await until(() => client.updates.get(0)?.data.length === 8)
  await client.close()
})

t.test('bfloat16 takes half the memory, and REST says its type, shape and norm', async (t) => {
  const client = await RawClient.connect(service.url)
  const groups = [
    { name: 'whole', algorithm: 'muon', momentum: 0 },
    { name: 'half', algorithm: 'muon', momentum: 0, ...BFLOAT16, ...NORMUON },
  ]
  const parameters = groups.map(({ name }) => ({ name, shape: [4, 2], group: name }))
  const admitted = () => service.device.admittedBytes
  const before = admitted()
  await client.open({ run: 'memory', groups, parameters })
  // State and update of each: 32 + 32, and 16 + 4 lines of 4 bytes + 32; and the largest gradient, in whole cache lines.
  t.equal(admitted() - before, 64 + 64 + 64)
  const gradient = Float32Array.of(3, 0, 0, 4, 0, 0, 0, 0)
  await client.step(1, [gradient, gradient])
  const [whole, half] = await Promise.all(
    [0, 1].map(async (index) => (await fetch(`${service.http}/v1/runs/memory/parameters/${index}`)).json()),
  )
  t.match(whole, { state_bytes: 32, state: [{ dtype: 'float32', shape: [4, 2], norm: 5 }] })
  t.match(half, {
    state_bytes: 16 + 16,
    state: [
      { name: 'momentum_buffer', dtype: 'bfloat16', shape: [4, 2], norm: 5, rms: 5 / Math.sqrt(8) },
      { name: 'second_momentum', dtype: 'float32', shape: [4, 1] },
    ],
  })
  await client.close()
})
