import { isDeepStrictEqual } from 'node:util'
import { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { Quorum } from '../../wire/frame.js'
import type { Ranges } from '../../wire/ranges.js'
import { memberId, type Position, type Seat } from './member.js'
import { Ranks } from './ranks.js'

type LayoutOptions = { seat: Seat | undefined; before?: Layout }

/** Which members a run has: its replicas, and the ranks of each. */
export class Layout {
  readonly world_size: number
  readonly replicas: number
  /** Whether members are named: a run of one that is not has no other members and no ranges. */
  readonly named: boolean
  /** When a step may be closed without all replicas; undefined: never. */
  readonly quorum: Quorum | undefined
  readonly #ranks: readonly Ranks[]
  /** What connected members have said of the weights that they begin with, by their numbers. */
  readonly #weights = new Map<number, string>()

  /** Of the members that a seat speaks of, undefined for the only one. What it leaves out is as it was `before`. */
  constructor(parameters: readonly Parameter[], { seat, before }: LayoutOptions) {
    const { world_size, replicas = 1 } = seat ?? { world_size: 1 }
    const kept = before?.named === (seat !== undefined) && before.world_size === world_size ? before : undefined
    this.world_size = world_size
    this.replicas = replicas
    this.named = seat !== undefined
    this.quorum = seat?.quorum ?? (kept?.replicas === replicas ? kept.quorum : undefined)
    this.#ranks = Array.from({ length: replicas }, (_, replica) => {
      return new Ranks(parameters, { replica, world_size, before: kept?.ranks(replica) })
    })
  }

  /** Whether gradients are means of several replicas. */
  get averages(): boolean {
    return this.replicas > 1
  }

  /** Whether a seat is one of this layout. */
  fits(seat: Position | undefined): boolean {
    if (!seat) return !this.named
    return this.named && this.world_size === seat.world_size && this.replicas === (seat.replicas ?? 1)
  }

  /** The ranks of a replica. */
  ranks(replica: number): Ranks {
    return this.#ranks[replica]
  }

  /** Every member that there may be, in order. */
  *positions(): Generator<{ rank: number; replica: number }> {
    for (let replica = 0; replica < this.replicas; replica++)
      for (let rank = 0; rank < this.world_size; rank++) yield { rank, replica }
  }

  /** Holds a seat against what is there, as `Ranks.checking` does; its quorum must be that of the others. */
  *checking(seat: Seat): Generator<undefined, void> {
    const { quorum, replica = 0 } = seat
    if (quorum && !isDeepStrictEqual(quorum, this.quorum)) {
      const message = `quorum is ${show(this.quorum)} in this run, ${show(quorum)} given: all members give the same`
      throw new ServiceError('RUN_MISMATCH', message)
    }
    yield* this.ranks(replica).checking(seat)
  }

  /** Throws RUN_MISMATCH where a member begins with other weights than the same rank of another replica. */
  checkWeights({ rank, replica = 0, weights }: Seat): void {
    if (weights === undefined) return
    for (let other = 0; other < this.replicas; other++) {
      const theirs = this.#weights.get(memberId({ rank, world_size: this.world_size, replica: other }))
      if (other === replica || theirs === undefined || theirs === weights) continue
      const message = `replica ${replica} begins with other weights than replica ${other}: at rank ${rank} their digests are ${weights} and ${theirs}`
      const remedy =
        'give all replicas the same before they open the run: broadcast those of replica 0, or load one file'
      throw new ServiceError('RUN_MISMATCH', `${message}; ${remedy}`)
    }
  }

  /** A member has lost its connection. */
  leave(id: number): void {
    this.#weights.delete(id)
  }

  /** Takes a seat over, which `checking` has found to fit. */
  declare(seat: Seat): Seat {
    const { rank, replica = 0, weights } = seat
    if (weights !== undefined) this.#weights.set(memberId(seat), weights)
    const ranges: readonly Ranges[] | undefined = this.ranks(replica).declare(seat)
    return { rank, replica, world_size: this.world_size, replicas: this.replicas, ...(ranges && { ranges }) }
  }
}

function show(quorum: Quorum | undefined): string {
  return quorum ? `${quorum.min_replicas} replicas after ${quorum.deadline_seconds} seconds` : 'all replicas'
}
