import { areBlocksFinite } from '../../../kernels/blocks.js'
import { isBlockDtype, type WireDtype } from '../../../kernels/dtype.js'
import { Averager } from '../cpu/mean.js'
import { createScanner } from '../cpu/scan.js'
import type { Scan } from '../cpu/scan-code.js'
import type { Executor } from '../executor.js'
import type { JobResult, Look, Request } from '../job.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { Views } from '../region.js'

/**
 * What a lane is asked for, whatever computes its jobs: means of tensors, which lie in the host's memory, are made
 * before the jobs that need them, and tensors are looked at.
 */
export class Requests {
  readonly executor: Executor
  readonly #averager = new Averager()
  readonly #scanner = createScanner()
  readonly #views = new Views()

  constructor(executor: Executor) {
    this.executor = executor
  }

  /** Answers in the order of the requests, of which none depends on another. */
  run(requests: readonly Request[]): JobResult[] {
    const jobs = requests.filter((request) => 'plan' in request)
    for (const { gradient, mean } of jobs) if (mean) this.#averager.write(gradient, mean, this.#views)
    const results = this.executor.run(jobs)
    let next = 0
    return requests.map((request) => ('plan' in request ? results[next++] : this.#look(request)))
  }

  forget(pointer: Pointer): void {
    this.#views.forget(pointer)
    this.executor.forget(pointer)
  }

  #look({ looksAt, gradient }: Look): JobResult {
    const started = performance.now()
    const { fingerprint, finite, squareSum } = this.#scan(this.#views.of(gradient), looksAt)
    return {
      outcome: finite ? 'computed' : 'not_finite',
      ...{ gradientFingerprint: fingerprint, gradientSquare: squareSum, updateFingerprint: 0n, updateSquare: 0 },
      computeSeconds: (performance.now() - started) / 1000,
    }
  }

  #scan(bytes: Uint8Array, dtype: WireDtype): Pick<Scan, 'fingerprint' | 'finite' | 'squareSum'> {
    if (!isBlockDtype(dtype)) return this.#scanner.scan(bytes, dtype)
    return { fingerprint: this.#scanner.fingerprint(bytes), finite: areBlocksFinite(bytes, dtype), squareSum: 0 }
  }
}
