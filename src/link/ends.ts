import { releaseMissed } from '../run/replicas/lates.js'
import type { Step } from '../run/step/step.js'
import { encodeFrame } from '../wire/codec.js'
import type { EndFrame, ReceiptFrame } from '../wire/frame.js'
import type { Answers, Joined } from './answers.js'
import type { Sender } from './websocket/sender.js'

export type EndsParts = {
  answers: Answers
  sender: Sender
  /** Tells the client of an error. */
  report: (error: unknown) => void
  /** Aborted when the connection ends. */
  gone: AbortSignal
}

/** Ends a connection's part of a step: what comes between its `end` and its receipt. */
export class Ends {
  readonly #parts: EndsParts

  constructor(parts: EndsParts) {
    this.#parts = parts
  }

  /**
   * Ends a step; answers whether it has, with a receipt. That is out, once all updates were sent, before anything of
   * the next step is looked at.
   */
  async take(joined: Joined, { step, skipped = [], weight = 1 }: EndFrame): Promise<boolean> {
    const { run, member } = joined
    const { answers, gone } = this.#parts
    if (run.intake.isLeftOut(member, step)) return this.#catchUp(joined, step)
    const given = { step, skipped, weight }
    run.intake.beginEnd(member, given)
    // The mean of replicas is computed when the step is closed, which this `end` may do.
    if (!run.intake.averages) await answers.settled()
    /* c8 ignore next -- it may end while its last updates are sent */
    if (gone.aborted) return false
    const ended = await run.intake.end(member, given)
    if (ended === 'left_out') return this.#catchUp(joined, step)
    await answers.settled()
    if (ended) await this.#sendReceipt(joined, ended)
    return ended !== undefined
  }

  /** Brings a member to where the others are that a step was closed without. */
  async #catchUp(joined: Joined, number: number): Promise<boolean> {
    const { notice, missed: waits } = joined.run.intake.catchUp(joined.member, number)
    if (notice) this.#parts.report(notice)
    const missed = await waits
    /* c8 ignore next -- it may be lost before the others have finished the step */
    if (!missed) return false
    const { step, updates, receipt } = missed
    try {
      for (const { index, update } of updates) await this.#parts.answers.sendMissed(joined, { step, index, update })
    } finally {
      releaseMissed(missed)
    }
    await this.#sendReceipt(joined, { ...receipt, contributed: false }, step)
    return true
  }

  /** Sends a receipt, and what belongs to it; `step` is that of the receipt, left out the last finished one. */
  async #sendReceipt(joined: Joined, receipt: ReceiptFrame, step?: Step): Promise<void> {
    await this.#sendSkipped(joined, receipt, step)
    await this.#parts.sender.send({ header: encodeFrame(receipt) })
  }

  /** Each waits for the one before to leave: a step may clip every parameter of a model without one gradient. */
  async #sendSkipped({ run, member }: Joined, { step, replayed }: ReceiptFrame, of?: Step): Promise<void> {
    for (const { parameter, row_scale } of run.skippedRowScales(member, of)) {
      const keys = { parameter, step, offset: 0, scale: 0, decay: 0, row_scale, replayed }
      const sent = await this.#parts.sender.send({ header: encodeFrame({ type: 'update', ...keys }) })
      /* c8 ignore next -- it may end while row scales are sent */
      if (!sent) return
    }
  }
}
