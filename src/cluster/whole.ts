import type { StepRecord } from '../run/digest.js'
import type { ReceiptFrame } from '../wire/frame.js'

/** What a shard tells of one of its parameters; `gradient_square` is the square of its gradient's norm, 0 if skipped. */
export type VotedRecord = StepRecord & { readonly gradient_square: number }

/**
 * What a shard tells the head of a step that it has finished: a record for each of its parameters, in order, its own
 * receipt, whose digest is that of the shard, and the generation of the assignment under which it was opened.
 */
export type Vote = {
  readonly generation: number
  readonly shard: number
  readonly step: number
  readonly records: readonly VotedRecord[]
  readonly receipt: ReceiptFrame
}
