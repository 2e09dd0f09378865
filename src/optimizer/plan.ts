import type { KernelSpec } from '../../kernels/kernel.js'

/**
 * One run of one kernel over a contiguous block of a parameter: `dims` as the graph sees it, `offset` in elements from
 * the tensor's start. `kernel` and `output_scale` override the plan's where the blocks of one parameter differ.
 * `line_offset` is where the block's numbers start in a state tensor that has one number for each row or column.
 */
export type Task = {
  readonly dims: readonly number[]
  readonly offset: number
  readonly line_offset?: number
  readonly output_scale?: number
  readonly kernel?: KernelSpec
}

/**
 * How to compute one parameter's step, as plain data. The client applies `W <- (1 - decay) W + scale · data`.
 * `scalars` holds every scalar input of the kernel but `gradient_scale`, which belongs to the step, and `output_scale`
 * where the tasks carry their own. `rms_factor` is RMS(scale · data) / (lr · RMS(data)), which stays finite at lr 0.
 */
export type Plan = {
  readonly kernel: KernelSpec
  readonly tasks: readonly Task[]
  readonly scalars: Readonly<Record<string, number>>
  readonly scale: number
  readonly decay: number
  readonly rms_factor: number
}

/**
 * Which step of a parameter is planned. `step` counts the updates of this parameter, from 1 and with the planned one
 * (torch's `step` after the update). In a replay the state holds the gradient already, and must not change.
 */
export type At = { readonly step: number; readonly replay: boolean }

/** The client's two factors: scale -lr·factor and decay lr·λ. 0 - 0 is 0, and -0 would give another digest. */
export function factors(lr: number, weight_decay: number, factor = 1): { scale: number; decay: number } {
  return { scale: 0 - lr * factor, decay: lr * weight_decay }
}
