import type { KernelSpec } from '../../kernels/kernel.js'
import type { Plan } from '../optimizer/plan.js'
import type { Pointer } from './onnxruntime.js'

/** A range of memory that host and device share; `block` is its whole allocation, of which a thread keeps one view. */
export type HostRange = { block: HostBlock; offset: number; bytes: number }
export type HostBlock = { pointer: Pointer; bytes: number }

/** One parameter's step as a lane computes it. It reads `state` and writes `next`: what becomes of them is the run's decision. */
export type Job = {
  plan: Plan
  gradient: HostRange
  gradient_scale: number
  /** The state tensors in the kernel's order; undefined before the first step, when all of them are zero. */
  state: readonly Pointer[] | undefined
  next: readonly Pointer[]
  update: HostRange
  /** A replay computes only if the gradient has this fingerprint. */
  expected?: bigint
}

export type JobResult = {
  /** 'computed': `next` and the update are ready. Otherwise nothing may be committed. */
  outcome: 'computed' | 'other_gradient' | 'not_finite'
  gradientFingerprint: bigint
  updateFingerprint: bigint
  /** Sum of squares of the gradient as received (before gradient_scale) and of the update's data. */
  gradientSquare: number
  updateSquare: number
  computeSeconds: number
}

export type LaneRequest =
  | { type: 'load'; id: number; kernels: readonly KernelSpec[] }
  | { type: 'run'; id: number; job: Job }
  | { type: 'forget'; pointer: Pointer }
  | { type: 'stop' }

export type LaneReply = { id: number; result: JobResult | undefined } | { id: number; error: string }

/** Elements of one run of an elementwise kernel: 1 MiB of float32, so that its intermediates stay in the cache. */
export const SLICE_ELEMENTS = 1 << 18
