/* c8 ignore start -- needs a GPU: npm run test:gpu */
import { CUDA_KERNELS } from '../../../kernels/cuda/entry-points.js'
import { MAX_BLOCKS, PARTIAL_BYTES, RESULT_BYTES } from '../../../kernels/cuda/source.js'
import type { Dtype } from '../../../kernels/dtype.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { type GpuJob, isOnGpu, isReceived, sourceOf } from './gpu-job.js'
import type { LaunchLists } from './launch-lists.js'
import { scanBlocks } from './pieces.js'

/** The scans of gradients and updates that no other kernel makes in passing, and the results of jobs. */
export class Scans {
  readonly #lists: LaunchLists
  /** Host memory with room for the results of a group of jobs. */
  readonly #results: Pointer

  constructor(lists: LaunchLists, results: Pointer) {
    this.#lists = lists
    this.#results = results
  }

  /**
   * Queues the scans of gradients on the GPU that no other kernel scans, and with them the copies of those that their
   * clients may change.
   */
  ofGradients(jobs: readonly GpuJob[]): void {
    for (const { job, gradient, scans, inPassing } of jobs) {
      if (!isOnGpu(job) || inPassing.gradient) continue
      const from = sourceOf(job).pointer
      const copy = isReceived(job) ? gradient : 0n
      this.#scan(from, { copy, bytes: job.gradient.bytes, dtype: job.plan.kernel.gradient_dtype, partials: scans })
    }
    this.#lists.launch()
  }

  /**
   * Queues the scans of updates, and of gradients that have come, where no other kernel scans them, and the sums of all
   * partial sums of each job.
   */
  report(jobs: readonly GpuJob[]): void {
    for (const gpuJob of jobs) {
      const { job, gradient, update, scans, inPassing } = gpuJob
      const { gradient_dtype, update_dtype } = job.plan.kernel
      const copy = 0n
      if (!isOnGpu(job) && !inPassing.gradient)
        this.#scan(gradient, { copy, bytes: job.gradient.bytes, dtype: gradient_dtype, partials: scans })
      const partials = updateScans(gpuJob)
      if (!inPassing.update) this.#scan(update, { copy, bytes: job.update.bytes, dtype: update_dtype, partials })
    }
    this.#lists.launch()
    for (const gpuJob of jobs) {
      const { job, scans, inPassing, checks, written, checkBlocks, result } = gpuJob
      const { gradient, update } = job
      this.#lists.add(CUDA_KERNELS.collect(), 1, [
        ...[inPassing.gradient ? 0n : scans, BigInt(scanBlocks(gradient.bytes)), BigInt(gradient.bytes)],
        inPassing.update ? written : updateScans(gpuJob),
        ...[BigInt(inPassing.update ? checkBlocks : scanBlocks(update.bytes)), BigInt(update.bytes)],
        ...[checks, BigInt(checkBlocks), this.#results + BigInt(result * RESULT_BYTES)],
      ])
    }
    this.#lists.launch()
  }

  #scan(from: Pointer, to: { copy: Pointer; bytes: number; dtype: Dtype; partials: Pointer }): void {
    const { copy, bytes, dtype, partials } = to
    this.#lists.add(CUDA_KERNELS.scan(dtype), scanBlocks(bytes), [from, copy, BigInt(bytes), partials])
  }
}

/** Where the partial sums of a kernel that only scans the update lie. */
function updateScans({ scans }: GpuJob): Pointer {
  return scans + BigInt(MAX_BLOCKS * PARTIAL_BYTES)
}
/* c8 ignore stop */
