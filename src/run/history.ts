import type { ImportRecord, RunRecord } from '../store/checkpoint/manifest.js'
import type { ReceiptFrame } from '../wire/frame.js'
import { FIRST_DIGEST } from './digest.js'

export type Receipt = ReceiptFrame

/** Events of a run: the receipt of each finished step, and the seconds that the journal took to write a step. */
export type RunEvents = { receipt: [Receipt]; committed: [number] }

/** The finished steps of a run: how many there are, what they come to, and the newest receipts. */
export class History {
  /** The last finished step. */
  step = 0
  /** Of the state that the last finished step, or an import after it, has left. */
  digest = FIRST_DIGEST
  /** The digest before the last finished step. */
  previous = FIRST_DIGEST
  /** Set where the state was imported after the last finished step. */
  imported: ImportRecord | undefined
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

  /** Of the last finished step itself. */
  get stepDigest(): string {
    return this.imported?.step_digest ?? this.digest
  }

  receipts(after: number): Receipt[] {
    return this.#receipts.filter((receipt) => receipt.step > after)
  }

  add(receipt: Receipt): void {
    this.previous = this.digest
    this.digest = receipt.digest
    this.imported = undefined
    this.step = receipt.step
    this.#receipts.push(receipt)
    if (this.#receipts.length > this.#kept) this.#receipts.shift()
  }

  /** The state is another one from now on. */
  replace(digest: string, imported: ImportRecord): void {
    this.digest = digest
    this.imported = imported
  }

  /** The last finished step was acknowledged with this receipt before. */
  acknowledge(receipt: Receipt): void {
    this.#receipts.splice(-1, 1, receipt)
  }

  /** Goes to where a checkpoint is; of what came after it nothing is left. */
  restore({ step, digest, previous_digest, receipt, imported }: RunRecord): void {
    this.step = step
    this.digest = digest
    this.previous = previous_digest
    this.imported = imported
    this.#receipts = [...this.#receipts.filter((known) => known.step < step), ...(receipt ? [receipt] : [])]
  }
}
