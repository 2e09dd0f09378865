import type { Job, JobResult, Need } from './job.js'
import type { Pointer } from './onnx/onnxruntime.js'

/** What a lane is started with; `folder` is that of libonnxruntime, and on a GPU of its CUDA provider. */
export type LaneOptions = CpuLane | CudaLane | CudaOnnxLane

export type CpuLane = { kind: 'cpu'; folder: string; threads: number }

/**
 * With kernels of our own: `cubin` is the machine code of CUDA_SOURCE for this GPU, `hopper` that of GEMM_SOURCE where the
 * GPU can run it.
 */
export type CudaLane = { kind: 'cuda'; folder: string; gpu: number; cubin: Uint8Array; hopper?: Uint8Array }

/** Without kernels of our own. */
export type CudaOnnxLane = { kind: 'cuda_onnx'; folder: string; gpu: number }

/** Bytes of device memory that a lane sets aside, use by use, and of what ONNX Runtime allocates beside it. */
export type Scratch = {
  readonly gradients: number
  readonly updates: number
  readonly partials: number
  readonly products: number
  readonly provider: number
}

/** What a lane computes with, all of it in the lane's own thread. */
export type Executor = {
  /** Makes ready for kernels, and for groups of jobs that need no more than `scratch`; undefined where nothing is set aside. */
  load(needs: readonly Need[], scratch?: Scratch): void
  /**
   * Computes jobs that do not depend on each other, and answers in their order. What else is in the list changes no bit.
   * Throws where the device cannot compute; an outcome tells of wrong numbers.
   */
  run(jobs: readonly Job[]): JobResult[]
  /** The allocation of host memory at this address is about to be freed. */
  forget(pointer: Pointer): void
  close(): void
}

/** What a device's thread asks of a lane's, and the answer to the request with the same `id`. */
export type LaneRequest =
  | { type: 'load'; id: number; needs: readonly Need[]; scratch?: Scratch }
  | { type: 'run'; id: number; jobs: readonly Job[] }
  | { type: 'forget'; pointer: Pointer }
  | { type: 'stop' }

export type LaneReply = { id: number; results: readonly JobResult[] } | { id: number; error: string }
