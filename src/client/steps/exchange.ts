import type { EndFrame, ErrorFrame, ReceiptFrame, ServerFrame, UpdateFrame, UpdatesFrame } from '../../wire/frame.js'
import type { Connection } from '../connection.js'
import { MuondError } from '../error.js'
import { frameError } from '../refusal.js'
import { unheard } from '../settings.js'
import type { Arenas } from '../transport/arenas.js'
import type { Step } from './step.js'
import type { Updates } from './updates.js'

type Parts = {
  connection: Connection
  step: Step
  updates: Updates
  chunk_bytes: number
  /** Memory that the connection shares with the service; undefined where all goes over the socket. */
  arenas: Arenas | undefined
  /** Whether gradients are means of replicas: then no update comes before `end`, and nothing is applied without it. */
  averages: boolean
  /** How often a quorum that did not come is waited for again. */
  retries: number
}

type Settle = { resolve: (receipt: ReceiptFrame) => void; reject: (reason: unknown) => void }

/** One attempt at one step: everything the trainer said goes out over one connection, and every update is applied. */
export class Exchange {
  readonly #parts: Parts
  readonly #settle: Settle
  readonly #unanswered = new Set<number>()
  /** Refusals that the step cannot be ended without; the others are the step's own. */
  readonly #refused: Refusal[] = []
  /** How many refusals the last `end` left out. */
  #leftOut = 0
  #isSent = false
  /** Whether an `end` is under way that the service has not taken back. */
  #isEnding = false
  /** Whether the step was closed without this replica: its updates come with `end`, whatever was sent. */
  #isLate = false
  #lostQuorums = 0

  /**
   * Resolves with the receipt, once every update is applied. Rejects with the reason the connection ended, or with the
   * service's error; if gradients were refused that the step cannot leave out, only when all the others were answered,
   * so that nothing is applied afterwards and `fields.refused` names them all.
   */
  static run(parts: Parts): Promise<ReceiptFrame> {
    return new Promise((resolve, reject) => {
      const exchange = new Exchange(parts, { resolve, reject })
      parts.connection.onFrame = (frame) => exchange.#receive(frame)
      parts.connection.onClosed = reject
      exchange.#send().catch(reject)
    })
  }

  private constructor(parts: Parts, settle: Settle) {
    this.#parts = parts
    this.#settle = settle
  }

  async #send(): Promise<void> {
    const { connection, step } = this.#parts
    if (step.frame !== undefined) await connection.send(step.frame)
    let sent = 0
    let { end } = step
    while (end === undefined || sent < step.gradients.length) {
      const waiting = step.gradients.slice(sent)
      sent = step.gradients.length
      if (waiting.length === 0) await step.more()
      else if (!this.#isLate) await this.#sendGradients(waiting)
      end = step.end
    }
    this.#isSent = true
    if (this.#refused.length === 0) await this.#sendEnd(end)
    else this.#rejectIfRefused()
  }

  async #sendEnd({ skipped = [], ...end }: EndFrame): Promise<void> {
    const { connection, step } = this.#parts
    this.#leftOut = step.leftOut.size
    this.#isEnding = true
    const without = [...skipped, ...step.leftOut.keys()]
    await connection.send({ ...end, ...(without.length > 0 && { skipped: without }) })
  }

  async #sendGradients(gradients: Step['gradients']): Promise<void> {
    const { step, arenas } = this.#parts
    const wanted = gradients.filter(([parameter]) => !step.leftOut.has(parameter))
    for (const [parameter] of wanted) this.#unanswered.add(parameter)
    if (arenas) return this.#shareGradients(arenas, wanted)
    for (const [parameter, bytes] of wanted) await this.#sendGradient(parameter, bytes)
  }

  /** Puts gradients into their slots, where some may lie already, and names them to the service. */
  async #shareGradients(arenas: Arenas, gradients: Step['gradients']): Promise<void> {
    const { connection, step } = this.#parts
    for (const [parameter, bytes] of gradients) {
      const slot = arenas.gradient(parameter)
      if (bytes.buffer !== slot.buffer || bytes.byteOffset !== slot.byteOffset) slot.set(bytes)
    }
    const parameters = gradients.map(([parameter]) => parameter)
    if (parameters.length > 0) await connection.send({ type: 'gradients', step: step.number, parameters })
  }

  async #sendGradient(parameter: number, bytes: Uint8Array): Promise<void> {
    const { connection, step, updates, chunk_bytes } = this.#parts
    let sent = 0
    for (const { offset, length } of updates.gradient(parameter).cuts(chunk_bytes)) {
      const header = { type: 'gradient', parameter, step: step.number, offset } as const
      await connection.sendData(header, bytes.subarray(sent, sent + length))
      sent += length
    }
  }

  #receive(frame: ServerFrame): void {
    switch (frame.type) {
      case 'update':
        return this.#update(frame)
      case 'updates':
        return this.#updates(frame)
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
    this.#rejectIfRefused()
  }

  #updates(frame: UpdatesFrame): void {
    const { updates, arenas } = this.#parts
    if (arenas === undefined) throw new MuondError('FRAME_UNEXPECTED', 'the service sent updates: no memory is shared')
    updates.takeShared(frame, (parameter) => arenas.update(parameter))
    for (const parameter of frame.parameters) this.#unanswered.delete(parameter)
    this.#rejectIfRefused()
  }

  #receipt(receipt: ReceiptFrame): void {
    const { step, updates } = this.#parts
    const isMissing = ([parameter]: [number, unknown]) => !updates.has(parameter) && !step.leftOut.has(parameter)
    // What others have skipped has no update for a replica that has sent it too late.
    const missing = this.#isLate ? undefined : step.gradients.find(isMissing)
    if (receipt.step !== step.number || missing !== undefined) {
      const what = missing === undefined ? `it is ${step.number}` : `'${updates.nameOf(missing[0])}' has no update yet`
      throw new MuondError('FRAME_UNEXPECTED', `the service sent the receipt of step ${receipt.step}: ${what}`)
    }
    const lacks = step.frame && !this.#isLate ? unheard(step.frame, receipt) : undefined
    if (lacks !== undefined) {
      const message = `the receipt of step ${step.number} ${lacks}: the step frame was lost on the way, go back to a checkpoint`
      throw new MuondError('STEP_CONFLICT', message, { step: step.number })
    }
    this.#parts.connection.rest()
    this.#settle.resolve(receipt)
  }

  #error(frame: ErrorFrame): void {
    if (frame.left_out) return this.#late()
    if (isRefusal(frame)) return this.#refusal(frame)
    if (frame.code === 'STEP_INCOMPLETE' && this.#crossed()) return
    if (frame.code === 'QUORUM_LOST' && this.#waitAgain()) return
    this.#settle.reject(frameError(frame))
  }

  /** The step was closed without this replica: no gradient of it is answered, and none was refused. */
  #late(): void {
    this.#isLate = true
    this.#unanswered.clear()
    this.#refused.length = 0
    const { end } = this.#parts.step
    /* c8 ignore next -- the notice may come before end is given, sent or while it is */
    if (end && this.#isSent && !this.#isEnding) this.#sendEnd(end).catch(this.#settle.reject)
  }

  /** Sends `end` again after a quorum that did not come: the gradients are there still. */
  #waitAgain(): boolean {
    const { step, retries } = this.#parts
    if (step.end === undefined || this.#lostQuorums >= retries) return false
    this.#lostQuorums += 1
    this.#sendEnd(step.end).catch(this.#settle.reject)
    return true
  }

  /** A gradient that is not finite can be left out of its step; one that differs from the applied one cannot. */
  #refusal(frame: Refusal): void {
    const { step } = this.#parts
    this.#unanswered.delete(frame.parameter)
    if (step.skip_refused && frame.code === 'GRADIENT_NOT_FINITE') step.leftOut.set(frame.parameter, frame)
    else this.#refused.push(frame)
    this.#rejectIfRefused()
  }

  /**
   * Whether STEP_INCOMPLETE answers an `end` that crossed a refusal on its way. Then `end` is sent again without that
   * gradient, or the step rejects with the refusal, which says more.
   */
  #crossed(): boolean {
    const { step } = this.#parts
    this.#isEnding = false
    if (this.#refused.length > 0) {
      this.#rejectIfRefused()
      return true
    }
    if (step.end === undefined || step.leftOut.size === this.#leftOut) return false
    this.#sendEnd(step.end).catch(this.#settle.reject)
    return true
  }

  #rejectIfRefused(): void {
    const { step, updates, averages } = this.#parts
    const isAnswered = this.#isSent && this.#unanswered.size === 0
    // An `end` may be refused for what another replica does with a parameter.
    const isOver = averages && (!this.#isEnding || this.#refused.some(({ code }) => code === 'STEP_CONFLICT'))
    if (this.#refused.length === 0 || !(isAnswered || isOver)) return
    const all = [...step.leftOut.keys(), ...this.#refused.map(({ parameter }) => parameter)]
    const refused = all.sort((a, b) => a - b).map((parameter) => updates.nameOf(parameter))
    this.#settle.reject(frameError(this.#refused[0], { refused }))
  }
}

type Refusal = ErrorFrame & { readonly parameter: number }

/** An error about one gradient: its state stayed as it was, and the stream goes on. */
function isRefusal(frame: ErrorFrame): frame is Refusal {
  return frame.parameter !== undefined && !frame.retryable && (frame.status === 409 || frame.status === 422)
}
