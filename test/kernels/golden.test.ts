import t from 'tap'
import { expandCoefficients, type Triple } from '../../kernels/orthogonalize/coefficients.js'
import {
  type AdamwState,
  adamwStep,
  averageLimit,
  momentumStep,
  orthogonalizeByIteration,
  relativeDistance,
} from '../reference.js'
import { type Golden, readGolden } from './golden.js'
import { loadKernel } from './session.js'

type MuonOptions = {
  lr: number
  weight_decay: number
  momentum: number
  nesterov: boolean
  ns_coefficients: Triple
  ns_steps: number
  eps: number
  adjust_lr_fn: 'match_rms_adamw' | null
}
type AdamwOptions = { lr: number; weight_decay: number; betas: [number, number]; eps: number }

const STEPS = [1, 2, 3, 4, 5]
const FLOAT32 = { gradient_dtype: 'float32', update_dtype: 'float32' } as const

for (const golden of readGolden<MuonOptions>('muon')) {
  const results = new Map<string, Promise<MuonStep[]>>()
  for (const [option, options] of Object.entries(golden.options)) {
    t.test(`${golden.name} ${option}: five steps of torch.optim.Muon`, async (t) => {
      // torch iterates in bfloat16 and is the coarser of the two; vectors round coarser still (README of the fixtures).
      const limit = golden.dims.includes(1) ? 0.06 : 0.035
      for (const { step, data, momentum, oracle } of await shared(results, golden, options)) {
        const ours = relativeDistance(data, oracle)
        t.ok(ours <= 1e-5, `step ${step}: update and float64 oracle ${ours}`)
        const buffer = relativeDistance(momentum, golden.get(`momentum.${options.momentum}.${step}`))
        t.ok(buffer <= (golden.bfloat16 ? 4e-3 : 1e-6), `step ${step}: momentum and torch's ${buffer}`)

        const before = step === 1 ? 'param.0' : `${option}.param.${step - 1}`
        const after = `${option}.param.${step}`
        if (!golden.has(before) || !golden.has(after)) continue
        const { lr, weight_decay } = options
        const scale = lr * adjustment(golden.dims, options)
        const decayed = golden.get(before).map((weight) => weight * (1 - lr * weight_decay))
        if (golden.bfloat16) {
          // A bfloat16 parameter keeps too little of one update to compare that; what is left is its own rounding.
          const moved = relativeDistance(
            decayed.map((weight, i) => weight - scale * data[i]),
            golden.get(after),
          )
          t.ok(moved <= 4e-3, `step ${step}: parameter and torch's ${moved}`)
          continue
        }
        const weights = golden.get(after)
        const update = decayed.map((weight, i) => (weight - weights[i]) / scale)
        const [distance, theirs] = [relativeDistance(data, update), relativeDistance(update, oracle)]
        t.ok(distance <= limit, `step ${step}: update and torch's ${distance}`)
        t.ok(ours < theirs, `step ${step}: nearer to float64 than torch, ${ours} and ${theirs}`)
      }
    })
  }
}

type MuonStep = { step: number; data: Float32Array; momentum: Float32Array; oracle: Float64Array }

/** Options that differ only in what the client does with the update share one computation. */
function shared(
  results: Map<string, Promise<MuonStep[]>>,
  golden: Golden<MuonOptions>,
  options: MuonOptions,
): Promise<MuonStep[]> {
  const key = JSON.stringify({ ...options, lr: 0, weight_decay: 0, adjust_lr_fn: null })
  const steps = results.get(key) ?? muonSteps(golden, options)
  results.set(key, steps)
  return steps
}

async function muonSteps(golden: Golden<MuonOptions>, options: MuonOptions): Promise<MuonStep[]> {
  const { momentum, nesterov, ns_steps, ns_coefficients, eps } = options
  const [rows, cols] = golden.dims
  const coefficients = expandCoefficients([ns_coefficients], ns_steps)
  const run = await loadKernel({ kind: 'muon', coefficients, tall: rows > cols, ...FLOAT32 })
  const direction = nesterov ? { n_m: momentum, n_g: 1 - momentum } : { n_m: 1, n_g: 0 }
  const scalars = { gradient_scale: 1, c_m: momentum, c_g: 1 - momentum, ...direction, eps, output_scale: 1 }
  const steps: MuonStep[] = []
  let state: ArrayLike<number> = new Float32Array(rows * cols)
  let exact = new Float64Array(rows * cols)
  for (const step of STEPS) {
    const gradient = golden.get(`grad.${step}`)
    const result = await run({ dims: golden.dims, gradient, state: { momentum_buffer: state }, scalars })
    const expected = momentumStep(exact, gradient, { momentum, nesterov, momentum_form: 'ema' })
    const oracle = orthogonalizeByIteration({ rows, cols, data: expected.direction }, coefficients).data
    state = result.momentum_buffer_next
    exact = expected.buffer
    steps.push({ step, data: result.data, momentum: result.momentum_buffer_next, oracle })
  }
  return steps
}

function adjustment([rows, cols]: number[], { adjust_lr_fn }: MuonOptions): number {
  return adjust_lr_fn === 'match_rms_adamw'
    ? 0.2 * Math.sqrt(Math.max(rows, cols))
    : Math.sqrt(Math.max(1, rows / cols))
}

for (const golden of readGolden<AdamwOptions>('adamw')) {
  for (const [option, options] of Object.entries(golden.options)) {
    t.test(`${golden.name} ${option}: five steps of torch.optim.AdamW`, async (t) => {
      // In the bf16 files torch keeps its state in bfloat16 and rounds it anew every step; ours is float32. The widest
      // distances are those of the scalar, whose exp_avg all but cancels in step 5.
      const limits = golden.bfloat16 ? { state: 3e-2, param: 8e-3 } : { state: 1e-6, param: 1e-6 }
      const { lr, weight_decay } = options
      for await (const { step, result, oracle, limit } of adamwSteps(golden, options)) {
        const ours = relativeDistance(result.data, oracle.data)
        t.ok(ours <= limit, `step ${step}: update and float64 oracle ${ours}, at most ${limit}`)
        for (const [name, most] of [
          ['exp_avg', limit],
          ['exp_avg_sq', 1e-6],
        ] as const) {
          const next = result[`${name}_next`]
          const [exact, theirs] = [
            relativeDistance(next, oracle[name]),
            relativeDistance(next, golden.get(`${option}.${name}.${step}`)),
          ]
          t.ok(exact <= most, `step ${step}: ${name} and float64 oracle ${exact}, at most ${most}`)
          t.ok(theirs <= limits.state, `step ${step}: ${name} and torch's ${theirs}`)
        }
        const before = golden.get(step === 1 ? 'param.0' : `${option}.param.${step - 1}`)
        const weights = before.map((weight, i) => weight * (1 - lr * weight_decay) - lr * result.data[i])
        const moved = relativeDistance(weights, golden.get(`${option}.param.${step}`))
        t.ok(moved <= limits.param, `step ${step}: parameter and torch's ${moved}`)
      }
    })
  }
}

async function* adamwSteps(golden: Golden<AdamwOptions>, { betas, eps }: AdamwOptions) {
  const [beta1, beta2] = betas
  const run = await loadKernel({ kind: 'adamw', ...FLOAT32 })
  const moments = { gradient_scale: 1, a_m: beta1, a_g: 1 - beta1, b_v: beta2, b_g: 1 - beta2, eps }
  const size = golden.get('param.0').length
  let state: Record<string, ArrayLike<number>> = {}
  let exact: AdamwState = { exp_avg: new Float64Array(size), exp_avg_sq: new Float64Array(size) }
  for (const step of STEPS) {
    const gradient = golden.get(`grad.${step}`)
    const scalars = { ...moments, bias1: 1 - beta1 ** step, bias2_sqrt: Math.sqrt(1 - beta2 ** step) }
    const result = await run({ dims: [size], gradient, state, scalars })
    const oracle = adamwStep(exact, gradient, { betas, eps, step })
    yield { step, result, oracle, limit: averageLimit(exact.exp_avg, oracle.exp_avg, beta1) }
    state = { exp_avg: result.exp_avg_next, exp_avg_sq: result.exp_avg_sq_next }
    exact = oracle
  }
}
