import type { BlockDtype, WireDtype } from '../../kernels/dtype.js'
import { type KernelSpec, kernelKey } from '../../kernels/kernel.js'
import type { Plan } from '../optimizer/plan.js'
import type { Pointer } from './onnx/onnxruntime.js'
import type { Span } from './region.js'

/** A tensor as it travels in blocks. */
export type Blocks = { readonly span: Span; readonly dtype: BlockDtype }

/** Tensors of one type in the host's memory, all finite, and the share that each has in their mean (cpu/mean.ts). */
export type Mean = {
  readonly dtype: WireDtype
  readonly parts: readonly { readonly span: Span; readonly share: number }[]
}

/** One parameter's step as a lane computes it. It reads `state` and writes `next`; the run decides which one stays. */
export type Job = {
  plan: Plan
  gradient: Span
  /** The gradient as it came, where that is in blocks: `gradient` is memory that it is decoded to. */
  received?: Blocks
  /** Memory that the client shares: its bytes are copied to `gradient` once, and only the copy is looked at. */
  source?: Span
  /** What the gradient, float32, is the mean of: it is written there first. */
  mean?: Mean
  gradient_scale: number
  /** The state tensors in the kernel's order; undefined before the first step, when all of them are zero. */
  state: readonly Pointer[] | undefined
  next: readonly Pointer[]
  update: Span
  /** Where the update is encoded in blocks, if it travels so: `update` is memory of its own then. */
  sent?: Blocks
  /** Set for a replay, which is computed only if the gradient has this fingerprint. */
  expected?: bigint
}

/** A tensor that a lane only looks at: the result has its fingerprint, and says whether it is finite. */
export type Look = { looksAt: WireDtype; gradient: Span }

/** What a lane is asked for. */
export type Request = Job | Look

export type JobResult = {
  /**
   * 'computed': `next` and the update are ready, or what was looked at is finite. With any other outcome nothing may be
   * committed.
   */
  outcome: 'computed' | 'other_gradient' | 'not_finite'
  /** Of the tensors as they travel. */
  gradientFingerprint: bigint
  updateFingerprint: bigint
  /** Sums of squares: of the gradient as received (before gradient_scale), and of the update's data as it is sent. */
  gradientSquare: number
  updateSquare: number
  computeSeconds: number
}

/** A kernel, and the dimensions of a block that it will be run on. */
export type Need = { kernel: KernelSpec; dims: readonly number[] }

/** A group of jobs is full, and goes to a lane, when it has this many jobs or its gradients have this many bytes. */
export type GroupLimit = { readonly jobs: number; readonly bytes: number }

/** What one parameter demands of a device: the plan of its step, and the bytes that a step works on. */
export type Demand = {
  readonly plan: Plan
  readonly gradient_bytes: number
  readonly update_bytes: number
  readonly state_bytes: number
  /** Bytes of an older state that may have to stay beside the new one, because a checkpoint of it is being written. */
  readonly held_bytes?: number
}

/** The most elements of one run of an elementwise kernel: 1 MiB of float32, so that intermediates stay in the cache. */
export const SLICE_ELEMENTS = 1 << 18

/** The value of a kernel's scalar input in a job; a task's own `output_scale` comes before it. */
export function scalarOf({ plan, gradient_scale }: Job, name: string): number {
  const value = name === 'gradient_scale' ? gradient_scale : plan.scalars[name]
  if (value === undefined) throw new Error(`the plan gives no ${name}`)
  return value
}

/** Every kernel of the plans, with all dimensions of blocks that it is used on. */
export function needsOf(demands: readonly Demand[]): Need[] {
  const needs = new Map<string, Need>()
  for (const plan of new Set(demands.map(({ plan }) => plan))) {
    // Tasks of one size have one kernel, and a parameter may have a quarter of a million tasks.
    const sizes = new Map(plan.tasks.map((task) => [String(task.dims), task]))
    for (const { kernel = plan.kernel, dims } of sizes.values())
      needs.set(`${kernelKey(kernel)} ${dims}`, { kernel, dims })
  }
  return [...needs.values()]
}
