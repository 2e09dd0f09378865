import type { RunRecord } from '../store/manifest.js'
import type { ReceiptFrame } from '../wire/frame.js'
import { FIRST_DIGEST } from './digest.js'

export type Receipt = ReceiptFrame

/** The finished steps of a run: how many there are, what they come to, and the newest receipts. */
export class History {
  /** The last finished step. */
  step = 0
  digest = FIRST_DIGEST
  /** The digest before the last finished step. */
  previous = FIRST_DIGEST
  #receipts: Receipt[] = []
  readonly #kept: number

  /** The newest `receipts_kept` receipts are kept. */
  constructor(receipts_kept: number) {
    this.#kept = receipts_kept
  }

  /** The receipt of the last finished step. */
  get last(): Receipt | undefined {
    return this.#receipts.at(-1)
  }

  receipts(after: number): Receipt[] {
    return this.#receipts.filter((receipt) => receipt.step > after)
  }

  add(receipt: Receipt): void {
    this.previous = this.digest
    this.digest = receipt.digest
    this.step = receipt.step
    this.#receipts.push(receipt)
    if (this.#receipts.length > this.#kept) this.#receipts.shift()
  }

  /** The last finished step was acknowledged with this receipt before. */
  acknowledge(receipt: Receipt): void {
    this.#receipts.splice(-1, 1, receipt)
  }

  /** Goes to where a checkpoint is; of what came after it nothing is left. */
  restore({ step, digest, previous_digest, receipt }: RunRecord): void {
    this.step = step
    this.digest = digest
    this.previous = previous_digest
    this.#receipts = [...this.#receipts.filter((known) => known.step < step), ...(receipt ? [receipt] : [])]
  }
}
