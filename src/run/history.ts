import type { ErrorCode, ServiceError } from '../errors.js'
import type { ImportRecord, RunRecord } from '../store/checkpoint/manifest.js'
import type { MemberStatus, ReceiptFrame } from '../wire/frame.js'
import { FIRST_DIGEST } from './digest.js'
import type { Measured } from './step/measured.js'
import type { Step } from './step/step.js'

export type Receipt = ReceiptFrame

/** A step that was finished; `measured` is undefined where another process has finished it. */
export type Finished = { readonly receipt: Receipt; readonly measured: Measured | undefined }

/** When the last step was finished, and the wall-clock seconds of the newest steps, the mean of them. */
export type Pace = { last_step_at: string; step_seconds: number }

/** For how many seconds the members of a run have waited at the end of a step for that of a rank of a replica. */
export type Waited = { readonly rank: number; readonly replica: number; readonly seconds: number }

/** An error that a member of a run was told; `at` is an RFC 3339 time. */
export type Refusal = {
  readonly at: string
  readonly rank: number
  /** Left out for replica 0. */
  readonly replica?: number
  readonly code: ErrorCode
  readonly message: string
  readonly parameter?: number
  readonly step?: number
}

/**
 * Events of a run: each finished step with its receipt and what was measured of it, the seconds that the journal took
 * to write a step and those that members waited for each other, a member that came or went, an error that one was
 * told, the replicas that a step was closed without, a quorum that did not come, and the end, when the run leaves
 * memory.
 */
export type RunEvents = {
  receipt: [Receipt, Measured, Step]
  committed: [number]
  waited: [readonly Waited[]]
  member: [MemberStatus]
  refused: [Refusal]
  left_out: [number]
  quorum_lost: []
  gone: []
}

/** The newest receipts are kept: so many, of so many bytes together. */
export type ReceiptLimits = { readonly receipts_kept: number; readonly receipts_bytes: number }

// About what V8 takes for a receipt, for an entry of one of its maps, and for a hyperparameter.
const RECEIPT_BYTES = 1280
const ENTRY_BYTES = 32
const VALUE_BYTES = 24
/** Over so many of the newest steps the pace is taken. */
const PACE_STEPS = 20

/** About the bytes that a receipt takes beside the one before it, whose groups it shares where they did not change. */
function weigh({ groups, clipped_heads }: Receipt, before: Receipt | undefined): number {
  const heads = Object.keys(clipped_heads).length * ENTRY_BYTES
  if (groups === before?.groups) return RECEIPT_BYTES + heads
  const own = Object.entries(groups).map(([name, values]) => {
    return ENTRY_BYTES + (values === before?.groups[name] ? 0 : Object.keys(values).length * VALUE_BYTES)
  })
  return own.reduce((sum, bytes) => sum + bytes, RECEIPT_BYTES + heads)
}

/** What a run keeps of an error that a member is told now. */
export function refusalOf(error: ServiceError, { rank, replica }: { rank: number; replica: number }): Refusal {
  const { code, message, fields } = error
  const { parameter, step } = fields
  const where = { ...(parameter !== undefined && { parameter }), ...(step !== undefined && { step }) }
  return { at: new Date().toISOString(), rank, ...(replica > 0 && { replica }), code, message, ...where }
}

/** The newest refusals of a run. */
export class Refusals {
  static readonly MOST = 100
  readonly #newest: Refusal[] = []

  add(refusal: Refusal): void {
    this.#newest.push(refusal)
    if (this.#newest.length > Refusals.MOST) this.#newest.shift()
  }

  /** Oldest first. */
  list(): readonly Refusal[] {
    return this.#newest
  }
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
  #receipts: (Finished & { bytes: number })[] = []
  /** Bytes that the receipts take. */
  #bytes = 0
  #finishedAt: number | undefined
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

  /**
   * When the last step was finished, as `performance.now` counts; undefined where no client of this process has.
   */
  get finishedAt(): number | undefined {
    return this.#finishedAt
  }

  /** Undefined where no step of this process is kept. */
  get pace(): Pace | undefined {
    const newest = this.#receipts.slice(-PACE_STEPS).flatMap(({ measured }) => (measured ? [measured] : []))
    const last = newest.at(-1)
    if (!last) return undefined
    const seconds = newest.reduce((sum, { wall_seconds }) => sum + wall_seconds, 0)
    return { last_step_at: last.finished_at, step_seconds: seconds / newest.length }
  }

  receipts(after: number): Finished[] {
    return this.#receipts.filter(({ receipt }) => receipt.step > after)
  }

  add(receipt: Receipt, measured?: Measured): void {
    this.previous = this.digest
    this.digest = receipt.digest
    this.imported = undefined
    this.step = receipt.step
    this.#finishedAt = performance.now()
    this.#keep(receipt, measured)
  }

  /** The state is another one from now on. */
  replace(digest: string, imported: ImportRecord): void {
    this.digest = digest
    this.imported = imported
  }

  /** The last finished step was acknowledged with this receipt before. */
  acknowledge(receipt: Receipt): void {
    this.#drop(this.#receipts.length - 1)
    this.#finishedAt = undefined
    this.#keep(receipt, undefined)
  }

  /** Goes to where a checkpoint is; of what came after it nothing is left. */
  restore({ step, digest, previous_digest, receipt, imported }: RunRecord): void {
    this.step = step
    this.digest = digest
    this.previous = previous_digest
    this.imported = imported
    const first = this.#receipts.findIndex((known) => known.receipt.step >= step)
    while (first >= 0 && this.#receipts.length > first) this.#drop(this.#receipts.length - 1)
    this.#finishedAt = undefined
    if (receipt) this.#keep(receipt, undefined)
  }

  /**
   * Keeps a receipt, and lets go of the oldest that are too many or too heavy. The newest is always kept: `end` may
   * ask for it again.
   */
  #keep(receipt: Receipt, measured: Measured | undefined): void {
    const bytes = weigh(receipt, this.last)
    this.#receipts.push({ receipt, measured, bytes })
    this.#bytes += bytes
    const { receipts_kept, receipts_bytes } = this.#limits
    while (this.#receipts.length > 1 && (this.#receipts.length > receipts_kept || this.#bytes > receipts_bytes))
      this.#drop(0)
  }

  #drop(position: number): void {
    for (const { bytes } of this.#receipts.splice(position, 1)) this.#bytes -= bytes
  }
}
