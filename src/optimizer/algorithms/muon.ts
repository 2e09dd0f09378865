import type { KernelSpec } from '../../../kernels/kernel.js'
import { iterations } from '../coefficients.js'
import type { Block, LaidParameter } from '../layout.js'
import { type At, factors, type Plan } from '../plan.js'
import type { AdjustLrFn, Hyperparameters } from '../table.js'

type MuonKernel = Extract<KernelSpec, { kind: 'muon' }>

/**
 * Muon (Jordan et al. 2024; torch.optim.Muon): B' = c_m·B + c_g·G, u = n_m·B' + n_g·G, data = O(u), scale = -lr·f.
 * With NorMuon (arXiv 2510.05491) V' = b_v·V + b_g·mean(O²) evens O out first.
 * One task per matrix of the parameter. Where their f differ, f goes into each block's `output_scale` instead.
 */
export function planMuon(parameter: LaidParameter, hyperparameters: Hyperparameters<'muon'>, { replay }: At): Plan {
  const { lr, weight_decay, eps, adjust_lr_fn, second_momentum } = hyperparameters
  const { blocks } = parameter
  const kernelOf = kernels(parameter, hyperparameters)
  const kernel = kernelOf(blocks[0])
  const adjustments = blocks.map(({ rows, cols }) => adjustment(adjust_lr_fn, rows, cols))
  const uniform = adjustments.every((factor) => factor === adjustments[0])
  const lines = second_momentum === 'normuon' ? lineOffsets(blocks) : undefined
  const tasks = blocks.map((block, i) => ({
    dims: [block.rows, block.cols],
    offset: block.offset,
    ...(lines ? { line_offset: lines[i] } : {}),
    ...(uniform ? {} : { output_scale: adjustments[i] }),
    ...(kernelOf(block) === kernel ? {} : { kernel: kernelOf(block) }),
  }))
  const shared = uniform ? adjustments[0] : 1
  const scalars = {
    ...momentumScalars(hyperparameters, replay),
    eps,
    ...(uniform ? { output_scale: 1 } : {}),
    ...(lines ? secondScalars(hyperparameters, replay) : {}),
  }
  return { kernel, tasks, scalars, ...factors(lr, weight_decay, shared), rms_factor: shared }
}

/** f, the factor that adjust_lr_fn multiplies lr with for a matrix of rows x cols. */
export function adjustment(adjust_lr_fn: AdjustLrFn, rows: number, cols: number): number {
  switch (adjust_lr_fn) {
    case 'original':
      return Math.sqrt(Math.max(1, rows / cols))
    // An orthogonal matrix has RMS 1/sqrt(max(rows, cols)); an AdamW update 0.2 to 0.4 (Moonlight, arXiv 2502.16982).
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

/** In a replay the buffer holds the gradient already: B' = B gives the u of the first time, bit for bit. */
function momentumScalars({ momentum, nesterov, momentum_form }: Hyperparameters<'muon'>, replay: boolean) {
  const share = momentum_form === 'ema' ? 1 - momentum : 1
  const [c_m, c_g] = replay ? [1, 0] : [momentum, share]
  const [n_m, n_g] = nesterov ? [momentum, share] : [1, 0]
  return { c_m, c_g, n_m, n_g }
}

function secondScalars({ beta2 }: Hyperparameters<'muon'>, replay: boolean) {
  return replay ? { b_v: 1, b_g: 0 } : { b_v: beta2, b_g: 1 - beta2 }
}

/** Finds a block's kernel: blocks of the same orientation have the same object, so a lane looks it up once. */
function kernels(parameter: LaidParameter, hyperparameters: Hyperparameters<'muon'>): (block: Block) => MuonKernel {
  const { kernel_dtypes } = parameter
  const { momentum_dtype, second_momentum } = hyperparameters
  const coefficients = iterations(hyperparameters)
  const narrow = momentum_dtype === 'float32' ? {} : { momentum_dtype }
  const known = new Map<string, MuonKernel>()
  return ({ rows, cols }) => {
    const tall = rows > cols
    const second = second_momentum === 'none' ? {} : { second_momentum: longerSide(rows, cols) }
    const key = `${tall} ${second.second_momentum}`
    const kernel = known.get(key) ?? {
      kind: 'muon',
      coefficients,
      tall,
      ...narrow,
      ...second,
      ...kernel_dtypes,
    }
    known.set(key, kernel)
    return kernel
  }
}

/**
 * Whether NorMuon has a statistic for each row or each column: whichever there are more of, rows of a square matrix.
 */
export function longerSide(rows: number, cols: number): 'row' | 'col' {
  return rows >= cols ? 'row' : 'col'
}

/** Where each block's numbers start in NorMuon's V, which has max(rows, cols) numbers for a block. */
function lineOffsets(blocks: readonly Block[]): number[] {
  let lines = 0
  return blocks.map(({ rows, cols }) => {
    lines += Math.max(rows, cols)
    return lines - Math.max(rows, cols)
  })
}
