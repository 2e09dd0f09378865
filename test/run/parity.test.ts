import t from 'tap'
import { expandCoefficients, NAMED_COEFFICIENTS, type Triple } from '../../kernels/orthogonalize/coefficients.js'
import { parseSafetensors } from '../../src/store/safetensors.js'
import { type Golden, readGolden } from '../kernels/golden.js'
import {
  adamwStep,
  averageLimit,
  momentumStep,
  orthogonalizeByIteration,
  relativeDistance,
  sgdStep,
} from '../reference.js'
import { normal, RawClient, type Service, startService } from '../service.js'

type Options = Record<string, unknown> & { lr: number; weight_decay: number }
type Gradient = Float32Array | Uint16Array

let service: Service
t.before(async () => {
  service = await startService()
})
t.teardown(() => service.app.close())

const floats = (data: Uint8Array) => new Float32Array(Uint8Array.from(data).buffer)
const bfloat16 = (values: ArrayLike<number>) =>
  Uint16Array.from(new Uint32Array(Float32Array.from(values).buffer), (word) => word >>> 16)
const widened = (halves: Uint16Array) => new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer)

/** Trains one parameter over the WebSocket and reads its state back over REST after each step. */
async function* train(name: string, declaration: { group: object; parameter: object; gradients: Iterable<Gradient> }) {
  const client = await RawClient.connect(service.url)
  const { group, parameter, gradients } = declaration
  const groups = [{ name: 'g', algorithm: 'muon', ...group }]
  await client.open({ run: name, groups, parameters: [{ name: 'p', shape: [], group: 'g', ...parameter }] })
  let step = 0
  for (const values of gradients) {
    step += 1
    client.gradient(0, step, { values, chunk: 5000 })
    client.send({ type: 'end', step })
    await client.expect('receipt')
    const answer = await fetch(`${service.http}/v1/runs/${name}/parameters/0/state`)
    const { tensors } = parseSafetensors(Buffer.from(await answer.arrayBuffer()))
    const state = (key: string) => floats(tensors.get(key)!.data)
    yield { step, update: client.updates.get(0)!, state }
  }
  await client.close()
  await fetch(`${service.http}/v1/runs/${name}`, { method: 'DELETE' })
}

type Trained = Awaited<ReturnType<ReturnType<typeof train>['next']>>['value'] & object

async function firstStep(steps: AsyncIterable<Trained>): Promise<Trained> {
  const seen: Trained[] = []
  for await (const step of steps) seen.push(step)
  return seen[0]!
}

const STEPS = [1, 2, 3, 4, 5]
const gradientsOf = (golden: Golden<unknown>) =>
  STEPS.map((step) =>
    golden.bfloat16 ? bfloat16(golden.get(`grad.${step}`)) : Float32Array.from(golden.get(`grad.${step}`)),
  )
const slug = (...words: unknown[]) => words.join('-').replace(/[^A-Za-z0-9._-]/g, '-')
const gradient_dtype = (golden: Golden<unknown>) => (golden.bfloat16 ? 'bfloat16' : 'float32')

for (const golden of readGolden<
  Options & {
    momentum: number
    nesterov: boolean
    ns_coefficients: Triple
    ns_steps: number
    adjust_lr_fn: string | null
  }
>('muon')) {
  for (const [option, { adjust_lr_fn, ...options }] of Object.entries(golden.options)) {
    t.test(
      `${golden.name} ${option} through the service: the update is torch's within its rounding, the momentum over REST too`,
      async (t) => {
        const [rows, cols] = golden.dims
        const coefficients = expandCoefficients([options.ns_coefficients], options.ns_steps)
        const group = { ...options, ...(adjust_lr_fn ? { adjust_lr_fn } : {}) }
        const parameter = { shape: golden.dims, gradient_dtype: gradient_dtype(golden) }
        let exact = new Float64Array(rows! * cols!)
        for await (const { step, update, state } of train(slug(golden.name, option), {
          group,
          parameter,
          gradients: gradientsOf(golden),
        })) {
          const expected = momentumStep(exact, golden.get(`grad.${step}`), { ...options, momentum_form: 'ema' })
          exact = Float64Array.from(expected.buffer)
          const oracle = orthogonalizeByIteration(
            { rows: rows!, cols: cols!, data: expected.direction },
            coefficients,
          ).data
          const ours = relativeDistance(floats(update.data), oracle)
          t.ok(ours <= 1e-5, `step ${step}: update and float64 oracle ${ours}`)
          const buffer = relativeDistance(state('momentum_buffer'), golden.get(`momentum.${options.momentum}.${step}`))
          t.ok(
            buffer <= (golden.bfloat16 ? 4e-3 : 1e-6),
            `step ${step}: momentum_buffer over REST and torch's ${buffer}`,
          )
          const before = step === 1 ? 'param.0' : `${option}.param.${step - 1}`
          const after = `${option}.param.${step}`
          t.equal(update.decay, options.lr * options.weight_decay)
          if (golden.bfloat16 || !golden.has(before) || !golden.has(after)) continue
          const weights = golden.get(after)
          const theirs = golden
            .get(before)
            .map((weight, i) => (weight * (1 - update.decay) - weights[i]!) / -update.scale)
          const distance = relativeDistance(floats(update.data), theirs)
          t.ok(distance <= (golden.dims.includes(1) ? 0.06 : 0.035), `step ${step}: update and torch's ${distance}`)
        }
      },
    )
  }
}

for (const golden of readGolden<Options & { betas: [number, number]; eps: number }>('adamw')) {
  for (const [option, options] of Object.entries(golden.options)) {
    t.test(`${golden.name} ${option} through the service is torch's AdamW`, async (t) => {
      const group = { ...options, algorithm: 'adamw' }
      const parameter = { shape: golden.dims, gradient_dtype: gradient_dtype(golden) }
      const size = golden.get('param.0').length
      let exact = { exp_avg: new Float64Array(size), exp_avg_sq: new Float64Array(size) }
      for await (const { step, update, state } of train(slug(golden.name, option), {
        group,
        parameter,
        gradients: gradientsOf(golden),
      })) {
        const expected = adamwStep(exact, golden.get(`grad.${step}`), { ...options, step })
        const limit = averageLimit(exact.exp_avg, expected.exp_avg, options.betas[0])
        const distance = relativeDistance(floats(update.data), expected.data)
        t.ok(distance <= limit, `step ${step}: update and float64 oracle ${distance}, at most ${limit}`)
        for (const [name, most] of [
          ['exp_avg', limit],
          ['exp_avg_sq', 1e-6],
        ] as const) {
          const moment = relativeDistance(state(name), expected[name])
          t.ok(moment <= most, `step ${step}: ${name} over REST and float64 oracle ${moment}, at most ${most}`)
        }
        exact = { exp_avg: Float64Array.from(expected.exp_avg), exp_avg_sq: Float64Array.from(expected.exp_avg_sq) }
      }
    })
  }
}

type Case = {
  name: string
  shape: number[]
  layout?: object
  group?: object
  blocks: [rows: number, cols: number][]
  coefficients?: readonly Triple[]
}
const KELLER = NAMED_COEFFICIENTS.keller_jordan
const CASES: Case[] = [
  {
    name: 'split',
    shape: [48, 20],
    layout: { split: [8, 30, 10] },
    blocks: [
      [8, 20],
      [30, 20],
      [10, 20],
    ],
  },
  {
    name: 'heads',
    shape: [48, 20],
    layout: { heads: 4 },
    blocks: [
      [12, 20],
      [12, 20],
      [12, 20],
      [12, 20],
    ],
  },
  {
    name: 'batch',
    shape: [3, 16, 24],
    layout: { matrices: 'batch' },
    blocks: [
      [16, 24],
      [16, 24],
      [16, 24],
    ],
  },
  { name: 'flatten', shape: [16, 3, 5], layout: { matrices: 'flatten' }, blocks: [[16, 15]] },
  { name: 'heavy_ball', shape: [20, 30], group: { momentum_form: 'heavy_ball' }, blocks: [[20, 30]] },
  {
    name: 'muonclip',
    shape: [20, 30],
    group: { algorithm: 'muonclip', momentum_form: 'heavy_ball' },
    blocks: [[20, 30]],
  },
  { name: 'plain momentum', shape: [20, 30], group: { nesterov: false, momentum: 0.5 }, blocks: [[20, 30]] },
  ...Object.entries(NAMED_COEFFICIENTS).map(([name, { coefficients, ns_steps }]) => {
    const blocks: [number, number][] = [[24, 24]]
    return {
      name,
      shape: [24, 24],
      group: { ns_coefficients: name },
      blocks,
      coefficients: expandCoefficients(coefficients, ns_steps),
    }
  }),
]

for (const { name, shape, layout, group, blocks, coefficients } of CASES) {
  t.test(`muon with ${name} is the float64 oracle of each matrix by itself`, async (t) => {
    const elements = shape.reduce((product, dim) => product * dim, 1)
    const options = { momentum: 0.95, nesterov: true, momentum_form: 'ema' as const, ...group }
    const gradients = [1, 2, 3].map((seed) => normal(seed, elements))
    let exact = new Float64Array(elements)
    const settings = { group: { lr: 0.1, adjust_lr_fn: 'none', ...group }, parameter: { shape, ...layout }, gradients }
    for await (const { step, update, state } of train(slug('case', name), settings)) {
      const expected = momentumStep(exact, gradients[step - 1]!, options)
      exact = Float64Array.from(expected.buffer)
      let offset = 0
      for (const [rows, cols] of blocks) {
        const data = expected.direction.slice(offset, offset + rows * cols)
        const oracle = orthogonalizeByIteration(
          { rows, cols, data },
          coefficients ?? expandCoefficients(KELLER.coefficients, 5),
        ).data
        const distance = relativeDistance(floats(update.data).subarray(offset, offset + rows * cols), oracle)
        t.ok(distance <= 1e-5, `step ${step}, rows from ${offset / cols}: ${distance}`)
        offset += rows * cols
      }
      const buffer = relativeDistance(state('momentum_buffer'), exact)
      t.ok(buffer <= 1e-6, `step ${step}: momentum_buffer ${buffer}`)
    }
  })
}

t.test('sgd is torch.optim.SGD: the first step is undampened, momentum 0 keeps no memory', async (t) => {
  for (const options of [
    { momentum: 0, dampening: 0, nesterov: false },
    { momentum: 0.9, dampening: 0.3, nesterov: false },
    { momentum: 0.7, dampening: 0, nesterov: true },
  ]) {
    const gradients = [1, 2, 3].map((seed) => normal(seed, 33))
    let buffer: Float64Array | undefined
    const settings = { group: { algorithm: 'sgd', lr: 0.1, ...options }, parameter: { shape: [33] }, gradients }
    for await (const { step, update } of train(slug('sgd', options.momentum), settings)) {
      const expected = sgdStep(buffer, Float64Array.from(gradients[step - 1]!), options)
      buffer = expected.buffer
      const distance = relativeDistance(floats(update.data), expected.data)
      t.ok(distance <= 1e-6, `momentum ${options.momentum}, step ${step}: ${distance}`)
    }
  }
})

t.test('updates in half precision are the float32 ones rounded to nearest even', async (t) => {
  const gradients = [normal(1, 600)]
  const settings = { group: { lr: 0.1 }, parameter: { shape: [20, 30] }, gradients }
  const exact = await firstStep(train('whole', settings))
  const half = await firstStep(train('half', { ...settings, parameter: { shape: [20, 30], update_dtype: 'bfloat16' } }))
  const rounded = Uint16Array.from(
    new Uint32Array(floats(exact.update.data).buffer),
    (word) => (word + 0x7fff + ((word >>> 16) & 1)) >>> 16,
  )
  t.same(new Uint16Array(Uint8Array.from(half.update.data).buffer), rounded)
  t.ok(relativeDistance(widened(rounded), floats(exact.update.data)) < 4e-3)
})

t.test('any gradient that float32 can hold gives the same direction, and zero gives zero', async (t) => {
  const base = normal(7, 20 * 30)
  const reference = await firstStep(train('scale-1', { group: {}, parameter: { shape: [20, 30] }, gradients: [base] }))
  for (const factor of [1e-30, 1e-12, 1e12, 1e30]) {
    const scaled = await firstStep(
      train(slug('scale', factor), {
        group: {},
        parameter: { shape: [20, 30] },
        gradients: [base.map((value) => value * factor)],
      }),
    )
    const distance = relativeDistance(floats(scaled.update.data), floats(reference.update.data))
    t.ok(distance <= 1e-5, `times ${factor}: ${distance}`)
  }
  const zero = await firstStep(
    train('zero', { group: {}, parameter: { shape: [20, 30] }, gradients: [new Float32Array(600)] }),
  )
  t.ok(floats(zero.update.data).every((value) => value === 0))
})
