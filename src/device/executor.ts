import type { Job, JobResult, Need } from './job.js'
import type { PackedJobs, PackedResults } from './lanes/packed-jobs.js'
import type { Pointer } from './onnx/onnxruntime.js'

/** What a lane is started with; `folder` is that of libonnxruntime, and on a GPU of its CUDA provider. */
export type LaneOptions = CpuLane | CudaLane | CudaOnnxLane

export type CpuLane = { kind: 'cpu'; folder: string; threads: number }

/**
 * A GPU with kernels of our own: `cubin` is the machine code of CUDA_SOURCE, `hopper` that of GEMM_SOURCE, which is
 * left out where the GPU cannot run it.
 */
export type CudaLane = { kind: 'cuda'; folder: string; gpu: number; cubin: Uint8Array; hopper?: Uint8Array }

/** A GPU with ONNX Runtime's kernels alone. */
export type CudaOnnxLane = { kind: 'cuda_onnx'; folder: string; gpu: number }

/**
 * Bytes of device memory that a lane sets aside for each use, and (`provider`) that ONNX Runtime allocates beside them.
 */
export type Scratch = {
  readonly gradients: number
  readonly updates: number
  readonly partials: number
  readonly products: number
  readonly provider: number
  /** A group of jobs is full when its gradients have so many bytes: whatever the last one has, it fits. */
  readonly full: number
}

/** Computes a lane's jobs, in the lane's own thread. */
export type Executor = {
  /** Prepares the kernels that jobs will need, and sets `scratch` aside; undefined where lanes set no memory aside. */
  load(needs: readonly Need[], scratch?: Scratch): void
  /**
   * Computes jobs that do not depend on each other, and answers in their order. The bits of a result do not depend on
   * the other jobs of the list. Throws where the device cannot compute; numbers that are not finite are an outcome.
   */
  run(jobs: readonly Job[]): JobResult[]
  /** The allocation of host memory at this address is about to be freed. */
  forget(pointer: Pointer): void
  close(): void
}

/** A message from the device's thread to a lane's. */
export type LaneRequest =
  | { type: 'load'; id: number; needs: readonly Need[]; scratch?: Scratch }
  | { type: 'run'; id: number; jobs: PackedJobs }
  | { type: 'forget'; pointer: Pointer }
  | { type: 'stop' }

/** The answer to the request with the same `id`. */
export type LaneReply = { id: number; results: PackedResults } | { id: number; error: string }
