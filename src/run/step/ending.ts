import type { Receipt, Waited } from '../history.js'
import type { Member } from './member.js'

type Ended = {
  member: Member
  at: number
  resolve: (receipt: Receipt | Promise<Receipt> | undefined) => void
}

/** The barrier at the end of a step: the members whose `end` has come wait here for those of all. */
export class Ending {
  readonly #ended = new Map<number, Ended>()

  /** How many members wait. */
  get size(): number {
    return this.#ended.size
  }

  /** The ranks whose `end` has come. */
  get ranks(): number[] {
    return [...this.#ended.keys()]
  }

  /** Seconds that the others have waited for the `end` of each rank, counted from the first one. */
  get waited(): Waited[] {
    const all = [...this.#ended]
    const first = all.reduce((least, [, { at }]) => Math.min(least, at), Infinity)
    return all.map(([rank, { at }]) => ({ rank, seconds: (at - first) / 1000 }))
  }

  /** Has a member wait; resolves with the receipt, or with undefined where the member is lost before. */
  wait(member: Member): Promise<Receipt | undefined> {
    return new Promise((resolve) => {
      this.#ended.set(member.rank, { member, at: performance.now(), resolve })
    })
  }

  /** Lets all members go with the receipt, or with the reason why there is none. */
  settle(receipt: Receipt | Promise<Receipt>): void {
    for (const { resolve } of this.#ended.values()) resolve(receipt)
    this.#ended.clear()
  }

  /** A member is lost: its `end` is forgotten. */
  leave(member: Member): void {
    const ended = this.#ended.get(member.rank)
    if (ended?.member !== member) return
    this.#ended.delete(member.rank)
    ended.resolve(undefined)
  }
}
