import { decodeBlocks, encodeBlocks } from '../../../kernels/blocks.js'
import { createScanner, type Scanner } from '../cpu/scan.js'
import type { Executor, Scratch } from '../executor.js'
import type { Blocks, Job, JobResult, Need } from '../job.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { type Span, Views } from '../region.js'

/**
 * A job as the executor is to compute it; `fingerprint` is that of a gradient in blocks. `refused` is the result of a
 * replay whose gradient has other bytes than the one that was applied: it is not computed.
 */
type Decoded = { job: Job; fingerprint?: bigint; seconds: number; refused?: JobResult }

/**
 * Has an executor compute jobs whose tensors travel in blocks: gradients are decoded before it and updates encoded
 * after it, on the host, so that every device computes with the same numbers. Other jobs pass unchanged.
 */
export class Transcoder implements Executor {
  readonly #executor: Executor
  readonly #views = new Views()
  /** Made when it is first needed. */
  #scanner: Scanner | undefined

  constructor(executor: Executor) {
    this.#executor = executor
  }

  load(needs: readonly Need[], scratch?: Scratch): void {
    this.#executor.load(needs, scratch)
  }

  run(jobs: readonly Job[]): JobResult[] {
    if (!jobs.some(({ received, sent }) => received ?? sent)) return this.#executor.run(jobs)
    const decoded = jobs.map((job) => this.#decode(job))
    const results = this.#executor.run(decoded.filter(({ refused }) => !refused).map(({ job }) => job))
    let next = 0
    return decoded.map((one) => one.refused ?? this.#encode(one, results[next++]))
  }

  forget(pointer: Pointer): void {
    this.#views.forget(pointer)
    this.#executor.forget(pointer)
  }

  close(): void {
    this.#executor.close()
  }

  #decode(job: Job): Decoded {
    const { received, gradient, expected } = job
    if (!received) return { job, seconds: 0 }
    const startedAt = performance.now()
    const fingerprint = this.#fingerprint(received)
    if (expected !== undefined && expected !== fingerprint)
      return { job, seconds: 0, refused: otherGradient(fingerprint, secondsSince(startedAt)) }
    decodeBlocks(this.#views.of(received.span), received.dtype, this.#float32(gradient))
    // The executor sees a gradient of which nobody knows the fingerprint.
    return { job: { ...job, expected: undefined }, fingerprint, seconds: secondsSince(startedAt) }
  }

  /** The result of a job as of its tensors in blocks. */
  #encode({ job: { sent, update }, fingerprint, seconds }: Decoded, result: JobResult): JobResult {
    const startedAt = performance.now()
    const { gradientFingerprint, computeSeconds } = result
    const answer = { ...result, gradientFingerprint: fingerprint ?? gradientFingerprint }
    if (sent && result.outcome === 'computed') {
      answer.updateSquare = encodeBlocks(this.#float32(update), sent.dtype, this.#views.of(sent.span))
      answer.updateFingerprint = this.#fingerprint(sent)
    }
    answer.computeSeconds = seconds + computeSeconds + secondsSince(startedAt)
    return answer
  }

  #fingerprint({ span }: Blocks): bigint {
    this.#scanner ??= createScanner()
    return this.#scanner.fingerprint(this.#views.of(span))
  }

  #float32(span: Span): Float32Array {
    const { buffer, byteOffset, length } = this.#views.of(span)
    return new Float32Array(buffer, byteOffset, length / Float32Array.BYTES_PER_ELEMENT)
  }
}

function otherGradient(gradientFingerprint: bigint, computeSeconds: number): JobResult {
  const nothing = { updateFingerprint: 0n, gradientSquare: 0, updateSquare: 0 }
  return { outcome: 'other_gradient', gradientFingerprint, ...nothing, computeSeconds }
}

function secondsSince(startedAt: number): number {
  return (performance.now() - startedAt) / 1000
}
