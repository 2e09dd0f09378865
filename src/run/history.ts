import type { ImportRecord, RunRecord } from '../store/checkpoint/manifest.js'
import type { MemberStatus, ReceiptFrame } from '../wire/frame.js'
import { FIRST_DIGEST } from './digest.js'

export type Receipt = ReceiptFrame

/** For how many seconds the members of a run have waited at the end of a step for that of a rank of a replica. */
export type Waited = { readonly rank: number; readonly replica: number; readonly seconds: number }

/**
 * Events of a run: the receipt of each finished step, the seconds that the journal took to write a step and those that
 * members waited for each other, a member that came or went, the replicas that a step was closed without, a quorum that
 * did not come, and the end, when the run leaves memory.
 */
export type RunEvents = {
  receipt: [Receipt]
  committed: [number]
  waited: [readonly Waited[]]
  member: [MemberStatus]
  left_out: [number]
  quorum_lost: []
  gone: []
}

/** The newest receipts are kept: so many, of so many bytes together. */
export type ReceiptLimits = { readonly receipts_kept: number; readonly receipts_bytes: number }

// About what V8 takes for a receipt, for an entry of one of its maps, and for a hyperparameter.
const RECEIPT_BYTES = 1024
const ENTRY_BYTES = 32
const VALUE_BYTES = 24

/** About the bytes that a receipt takes beside the one before it, whose groups it shares where they did not change. */
function weigh({ groups, clipped_heads }: Receipt, before: Receipt | undefined): number {
  const heads = Object.keys(clipped_heads).length * ENTRY_BYTES
  if (groups === before?.groups) return RECEIPT_BYTES + heads
  const own = Object.entries(groups).map(([name, values]) => {
    return ENTRY_BYTES + (values === before?.groups[name] ? 0 : Object.keys(values).length * VALUE_BYTES)
  })
  return own.reduce((sum, bytes) => sum + bytes, RECEIPT_BYTES + heads)
}

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
  #receipts: { receipt: Receipt; bytes: number }[] = []
  /** Bytes that the receipts take. */
  #bytes = 0
  readonly #limits: ReceiptLimits

  constructor(limits: ReceiptLimits) {
    this.#limits = limits
  }

  /** The receipt of the last finished step. */
  get last(): Receipt | undefined {
    return this.#receipts.at(-1)?.receipt
  }

  /** Of the last finished step itself. */
  get stepDigest(): string {
    return this.imported?.step_digest ?? this.digest
  }

  receipts(after: number): Receipt[] {
    return this.#receipts.map(({ receipt }) => receipt).filter(({ step }) => step > after)
  }

  add(receipt: Receipt): void {
    this.previous = this.digest
    this.digest = receipt.digest
    this.imported = undefined
    this.step = receipt.step
    this.#keep(receipt)
  }

  /** The state is another one from now on. */
  replace(digest: string, imported: ImportRecord): void {
    this.digest = digest
    this.imported = imported
  }

  /** The last finished step was acknowledged with this receipt before. */
  acknowledge(receipt: Receipt): void {
    this.#drop(this.#receipts.length - 1)
    this.#keep(receipt)
  }

  /** Goes to where a checkpoint is; of what came after it nothing is left. */
  restore({ step, digest, previous_digest, receipt, imported }: RunRecord): void {
    this.step = step
    this.digest = digest
    this.previous = previous_digest
    this.imported = imported
    const first = this.#receipts.findIndex((known) => known.receipt.step >= step)
    while (first >= 0 && this.#receipts.length > first) this.#drop(this.#receipts.length - 1)
    if (receipt) this.#keep(receipt)
  }

  /**
   * Keeps a receipt, and lets go of the oldest that are too many or too heavy. The newest is always kept: `end` may
   * ask for it again.
   */
  #keep(receipt: Receipt): void {
    const bytes = weigh(receipt, this.last)
    this.#receipts.push({ receipt, bytes })
    this.#bytes += bytes
    const { receipts_kept, receipts_bytes } = this.#limits
    while (this.#receipts.length > 1 && (this.#receipts.length > receipts_kept || this.#bytes > receipts_bytes))
      this.#drop(0)
  }

  #drop(position: number): void {
    for (const { bytes } of this.#receipts.splice(position, 1)) this.#bytes -= bytes
  }
}
