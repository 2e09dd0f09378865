/* c8 ignore start -- needs a GPU: npm run test:gpu */
import type { ProductType } from '../../../kernels/cuda/entry-points.js'
import { bytesPerElement, type Dtype } from '../../../kernels/dtype.js'
import type { KernelSpec } from '../../../kernels/kernel.js'
import type { Job } from '../job.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import type { Span } from '../region.js'
import { isMuon, type MuonSpec, type Piece, packOf, type ScannedInPassing, type Stack } from './pieces.js'

/** A job with its addresses in device memory. */
export type GpuJob = {
  job: Job
  pieces: Piece[]
  inPassing: ScannedInPassing
  gradient: Pointer
  update: Pointer
  /**
   * Where the partial sums lie: those of both scans (gradient, update), those that must be finite, and those of the
   * kernels that write the update.
   */
  scans: Pointer
  checks: Pointer
  written: Pointer
  checkBlocks: number
  result: number
}

/** The pieces of a plan, and how many partial sums tell whether its result is finite. */
export type CutPlan = {
  readonly pieces: Piece[]
  readonly checkBlocks: number
  readonly inPassing: ScannedInPassing
}

/** One piece of a job; `partials` are the addresses of each stack's partial sums among its checks. */
export type JobPiece = Piece & { gpuJob: GpuJob; partials: Pointer[]; last: boolean }

/** A stack of a job; `partials` is the address of its first matrix's partial sums among the job's checks. */
export type JobStack<Spec extends KernelSpec = KernelSpec> = { gpuJob: GpuJob; stack: Stack<Spec>; partials: Pointer }

/** One matrix that goes through Newton-Schulz: number `index` of its stack. */
export type JobMatrix = JobStack<MuonSpec> & { index: number }

/**
 * Where the matrix products of one Newton-Schulz read X and leave O, both of type `product`: X has to be u/‖u‖ times
 * `input_scale`, and the result times `output_scale` is O.
 */
export type Ends = {
  readonly x: Pointer
  readonly o: Pointer
  readonly product: ProductType
  readonly input_scale: number
  readonly output_scale: number
}

/** Whether a job computes on a copy of its gradient: it comes from the host, or its client may change it. */
export function isReceived({ gradient, source }: Job): boolean {
  return source !== undefined || gradient.shared || gradient.space === 'host'
}

/** Where the bytes of a job's gradient come from. */
export function sourceOf({ source, gradient }: Job): Span {
  return source ?? gradient
}

/** Whether a kernel can read the gradient where it comes from, and nobody wants a copy of it in host memory. */
export function isOnGpu(job: Job): boolean {
  return sourceOf(job).space === 'gpu' && job.gradient.space === 'gpu'
}

/** Whether a job's gradient or its update goes over the bus between the host and the GPU. */
export function crossesBus({ job }: GpuJob): boolean {
  return !isOnGpu(job) || job.update.space === 'host'
}

export function isMatrices(one: JobStack): one is JobStack<MuonSpec> {
  return isMuon(one.stack)
}

export function matricesOf(one: JobStack<MuonSpec>): JobMatrix[] {
  return Array.from({ length: one.stack.count }, (_, index) => ({ ...one, index }))
}

/** The address of a matrix in a tensor of its parameter that starts at `base`. */
export function at(
  { stack, index }: Pick<JobMatrix, 'index'> & { stack: Stack },
  base: Pointer,
  dtype: Dtype,
): Pointer {
  return base + BigInt((stack.offset + index * stack.rows * stack.cols) * bytesPerElement(dtype))
}

/** The number of a matrix's first word of 8 bytes in a tensor of its parameter. */
export function firstWord({ stack, index }: Pick<JobMatrix, 'index'> & { stack: Stack }, dtype: Dtype): bigint {
  return at({ stack, index }, 0n, dtype) / 8n
}

export function packsOf(stack: Stack): bigint {
  return BigInt((stack.rows * stack.cols) / packOf(stack))
}
/* c8 ignore stop */
