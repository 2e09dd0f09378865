import { iterations } from './coefficients.js'
import type { Block, Parameter } from './parameter.js'
import { type At, factors, type Plan } from './plan.js'
import type { AdjustLrFn, Hyperparameters } from './table.js'

/**
 * Muon (Jordan et al. 2024; torch.optim.Muon): B' = c_m·B + c_g·G, u = n_m·B' + n_g·G, data = O(u), scale = -lr·f.
 * One task per matrix of the parameter. Where their f differ, f goes into each block's `output_scale` instead.
 */
export function planMuon(parameter: Parameter, hyperparameters: Hyperparameters<'muon'>, { replay }: At): Plan {
  const { lr, weight_decay, eps, adjust_lr_fn } = hyperparameters
  const { blocks } = parameter
  const kernel = kernelOf(parameter, hyperparameters)
  const transposed = { ...kernel, tall: !kernel.tall }
  const adjustments = blocks.map(({ rows, cols }) => adjustment(adjust_lr_fn, rows, cols))
  const uniform = adjustments.every((factor) => factor === adjustments[0])
  const tasks = blocks.map((block, i) => ({
    dims: [block.rows, block.cols],
    offset: block.offset,
    ...(uniform ? {} : { output_scale: adjustments[i] }),
    ...(isTall(block) === kernel.tall ? {} : { kernel: transposed }),
  }))
  const shared = uniform ? adjustments[0] : 1
  const scalars = { ...momentumScalars(hyperparameters, replay), eps, ...(uniform ? { output_scale: 1 } : {}) }
  return { kernel, tasks, scalars, ...factors(lr, weight_decay, shared), rms_factor: shared }
}

/** f: what adjust_lr_fn multiplies lr with for one matrix of rows x cols. */
export function adjustment(adjust_lr_fn: AdjustLrFn, rows: number, cols: number): number {
  switch (adjust_lr_fn) {
    case 'original':
      return Math.sqrt(Math.max(1, rows / cols))
    // An orthogonal matrix has RMS 1/sqrt(max(rows, cols)); AdamW's updates have 0.2 to 0.4 (Moonlight, arXiv 2502.16982).
    case 'match_rms_adamw':
      return 0.2 * Math.sqrt(Math.max(rows, cols))
    case 'spectral':
      return Math.sqrt(rows / cols)
    case 'none':
      return 1
    default:
      return Number(adjust_lr_fn.slice('rms:'.length)) * Math.sqrt(Math.max(rows, cols))
  }
}

/** A replay finds the gradient in the buffer already: B' = B, and u is what it was the first time, bit for bit. */
function momentumScalars({ momentum, nesterov, momentum_form }: Hyperparameters<'muon'>, replay: boolean) {
  const share = momentum_form === 'ema' ? 1 - momentum : 1
  const [c_m, c_g] = replay ? [1, 0] : [momentum, share]
  const [n_m, n_g] = nesterov ? [momentum, share] : [1, 0]
  return { c_m, c_g, n_m, n_g }
}

function kernelOf({ blocks, gradient_dtype, update_dtype }: Parameter, hyperparameters: Hyperparameters<'muon'>) {
  const tall = isTall(blocks[0])
  return { kind: 'muon', coefficients: iterations(hyperparameters), tall, gradient_dtype, update_dtype } as const
}

function isTall({ rows, cols }: Block): boolean {
  return rows > cols
}
