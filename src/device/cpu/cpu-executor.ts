import type { Executor, Scratch } from '../executor.js'
import type { Job, JobResult, Need } from '../job.js'
import { hostSpace } from '../onnx/host-space.js'
import { OnnxExecutor } from '../onnx/onnx-executor.js'
import type { OnnxRuntime, Pointer } from '../onnx/onnxruntime.js'
import { Elementwise } from './elementwise.js'
import { isElementwise } from './formulas.js'

/** Computes jobs on the CPU, one at a time: elementwise kernels in WebAssembly, the others with ONNX Runtime. */
export class CpuExecutor implements Executor {
  readonly #elementwise = new Elementwise()
  readonly #onnx: OnnxExecutor

  /** Sessions of ONNX Runtime have `threads` threads. */
  constructor(runtime: OnnxRuntime, threads: number) {
    this.#onnx = new OnnxExecutor(runtime, hostSpace(runtime, threads), { half: false })
  }

  load(needs: readonly Need[], scratch?: Scratch): void {
    for (const { kernel } of needs) if (isElementwise(kernel)) this.#elementwise.load(kernel)
    this.#onnx.load(
      needs.filter(({ kernel }) => !isElementwise(kernel)),
      scratch,
    )
  }

  run(jobs: readonly Job[]): JobResult[] {
    const others = this.#onnx.run(jobs.filter(({ plan }) => !isElementwise(plan.kernel)))
    let next = 0
    return jobs.map((job) => {
      const { kernel } = job.plan
      return isElementwise(kernel) ? this.#elementwise.run(job, kernel) : others[next++]
    })
  }

  forget(pointer: Pointer): void {
    this.#onnx.forget(pointer)
  }

  close(): void {
    this.#onnx.close()
  }
}
