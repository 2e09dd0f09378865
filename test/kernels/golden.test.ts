import t from 'tap'
import { expandCoefficients, type Triple } from '../../kernels/coefficients.js'
import { adamwStep, type AdamwState, momentumStep, orthogonalizeByIteration, relativeDistance } from '../reference.js'
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
  adjust_lr_fn: string | null
}
const STEPS = [1, 2, 3, 4, 5]
const float32 = { gradient_dtype: 'float32', update_dtype: 'float32' } as const

for (const golden of readGolden<MuonOptions>('muon')) {
  for (const [option, options] of Object.entries(golden.options)) {
    t.test(`${golden.name} ${option}`, async (t) => {
      let W = golden.get('param.0')
      let worst=0, worstm=0, worsto=0, wp=0
      const [rows, cols] = golden.dims
      const run = await loadKernel({ kind: 'muon', coefficients: expandCoefficients([options.ns_coefficients], options.ns_steps), tall: rows > cols, ...float32 })
      const mu = options.momentum
      const n = options.nesterov ? { n_m: mu, n_g: 1 - mu } : { n_m: 1, n_g: 0 }
      const f = options.adjust_lr_fn === 'match_rms_adamw' ? 0.2 * Math.sqrt(Math.max(rows, cols)) : Math.sqrt(Math.max(1, rows / cols))
      let state: Float32Array = new Float32Array(rows * cols)
      let mine = W
      for (const step of STEPS) {
        const gradient = golden.get(`grad.${step}`)
        const r = await run({ dims: golden.dims, gradient, state: { momentum_buffer: state }, scalars: { gradient_scale: 1, c_m: mu, c_g: 1 - mu, ...n, eps: options.eps, output_scale: 1 } })
        state = r.momentum_buffer_next
        worstm = Math.max(worstm, relativeDistance(state, golden.get(`momentum.${mu}.${step}`)))
        const key = `${option}.param.${step}`, prev = step === 1 ? 'param.0' : `${option}.param.${step - 1}`
        mine = mine.map((w, i) => w * (1 - options.lr * options.weight_decay) - options.lr * f * r.data[i])
        if (golden.has(key) && golden.has(prev)) {
          const a = golden.get(key), b = golden.get(prev)
          const up = b.map((w, i) => (w * (1 - options.lr * options.weight_decay) - a[i]) / (options.lr * f))
          worst = Math.max(worst, relativeDistance(r.data, up))
          wp = Math.max(wp, relativeDistance(b.map((w, i) => w * (1 - options.lr * options.weight_decay) - options.lr * f * r.data[i]), a))
        }
      }
      const p0=golden.get('param.0'), p5 = golden.get(`${option}.param.5`)
      console.log(golden.name, option, 'update', worst.toExponential(2), 'mom', worstm.toExponential(2), 'param/step', wp.toExponential(2), '5change', relativeDistance(mine.map((v,i)=>v-p0[i]), p5.map((v,i)=>v-p0[i])).toExponential(2))
    })
  }
}
