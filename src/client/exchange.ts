import { chunksOf } from '../wire/chunks.js'
import type { EndFrame, ErrorFrame, ReceiptFrame, ServerFrame, UpdateFrame } from '../wire/frame.js'
import type { Connection } from './connection.js'
import { MuondError } from './error.js'
import { frameError } from './refusal.js'
import type { Step } from './step.js'
import type { Updates } from './updates.js'

type Parts = {
  connection: Connection
  step: Step
  updates: Updates
  chunk_bytes: number
}

/** One attempt at one step: everything the trainer said goes out over one connection, and every update is applied. */
export class Exchange {
  readonly #parts: Parts
  readonly #unanswered = new Set<number>()
  readonly #refused: Refusal[] = []
  #isSent = false
  #resolve: (receipt: ReceiptFrame) => void = () => {}
  #reject: (reason: unknown) => void = () => {}

  constructor(parts: Parts) {
    this.#parts = parts
  }

  /**
   * Resolves with the receipt, once every update is applied. Rejects with the reason the connection ended, or with the
   * service's error; if gradients were refused, only when all the others were answered, so that nothing is applied afterwards
   * and `fields.refused` names them all.
   */
  run(): Promise<ReceiptFrame> {
    const { connection } = this.#parts
    return new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
      connection.onFrame = (frame) => this.#receive(frame)
      connection.onClosed = reject
      this.#send().catch(reject)
    })
  }

  async #send(): Promise<void> {
    const { connection, step } = this.#parts
    if (step.frame !== undefined) await connection.send(step.frame)
    const end = await this.#sendGradients()
    this.#isSent = true
    if (this.#refused.length === 0) await connection.send(end)
    else this.#settle()
  }

  async #sendGradients(): Promise<EndFrame> {
    const { step } = this.#parts
    for (let sent = 0; ; sent++) {
      while (sent === step.gradients.length) {
        if (step.end !== undefined) return step.end
        await step.more()
      }
      await this.#sendGradient(...step.gradients[sent])
    }
  }

  async #sendGradient(parameter: number, bytes: Uint8Array): Promise<void> {
    const { connection, step, chunk_bytes } = this.#parts
    this.#unanswered.add(parameter)
    for (const { offset, length } of chunksOf(bytes.byteLength, chunk_bytes)) {
      const header = { type: 'gradient', parameter, step: step.number, offset } as const
      await connection.sendData(header, bytes.subarray(offset, offset + length))
    }
  }

  #receive(frame: ServerFrame): void {
    switch (frame.type) {
      case 'update':
        return this.#update(frame)
      case 'receipt':
        return this.#receipt(frame)
      case 'error':
        return this.#error(frame)
      case 'draining':
        // A step in flight may end; the next one hears of it again, as an error that is worth a retry.
        return
      default:
        throw new MuondError('FRAME_UNEXPECTED', `the service sent ${frame.type} during a step`)
    }
  }

  #update(frame: UpdateFrame): void {
    if (this.#parts.updates.take(frame)) this.#unanswered.delete(frame.parameter)
    this.#settle()
  }

  #receipt(receipt: ReceiptFrame): void {
    const { step, updates } = this.#parts
    const missing = step.gradients.find(([parameter]) => !updates.has(parameter))
    if (receipt.step !== step.number || missing !== undefined) {
      const what = missing === undefined ? `it is ${step.number}` : `'${updates.nameOf(missing[0])}' has no update yet`
      throw new MuondError('FRAME_UNEXPECTED', `the service sent the receipt of step ${receipt.step}: ${what}`)
    }
    this.#resolve(receipt)
  }

  #error(frame: ErrorFrame): void {
    if (isRefusal(frame)) {
      this.#unanswered.delete(frame.parameter)
      this.#refused.push(frame)
      return this.#settle()
    }
    // The `end` that crossed a refusal on its way is answered with this; the refusal says more.
    if (this.#refused.length > 0 && frame.code === 'STEP_INCOMPLETE') return
    this.#reject(frameError(frame))
  }

  #settle(): void {
    if (this.#refused.length === 0 || !this.#isSent || this.#unanswered.size > 0) return
    const refused = this.#refused.map(({ parameter }) => this.#parts.updates.nameOf(parameter))
    this.#reject(frameError(this.#refused[0], { refused }))
  }
}

type Refusal = ErrorFrame & { readonly parameter: number }

/** An error about one gradient: its state stayed as it was, and the stream goes on. */
function isRefusal(frame: ErrorFrame): frame is Refusal {
  return frame.parameter !== undefined && !frame.retryable && (frame.status === 409 || frame.status === 422)
}
