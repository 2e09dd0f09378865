import type { Receipt, Waited } from '../history.js'
import type { Member } from '../members/member.js'

/** What a member's `end` comes to: undefined where the member is lost before, or its `end` was taken back. */
export type Ended = Receipt | 'left_out' | undefined

/** A member whose `end` has come, and the weight that it gives its replica. */
export type EndedMember = { readonly member: Member; readonly weight: number; readonly skipped: readonly number[] }

type Waiting = EndedMember & { at: number; resolve: (ended: Ended | Promise<Ended>) => void }

/** The barrier at the end of a step: the members whose `end` has come wait here for those of all. */
export class Ending {
  readonly #ended = new Map<number, Waiting>()

  /** How many members wait. */
  get size(): number {
    return this.#ended.size
  }

  /** The numbers of the members whose `end` has come. */
  get ids(): number[] {
    return [...this.#ended.keys()]
  }

  /** Seconds that the others have waited for the `end` of each member, counted from the first one. */
  get waited(): Waited[] {
    const all = [...this.#ended.values()]
    const first = all.reduce((least, { at }) => Math.min(least, at), Infinity)
    return all.map(({ member: { rank, replica }, at }) => ({ rank, replica, seconds: (at - first) / 1000 }))
  }

  /** The members of a replica whose `end` has come. */
  of(replica: number): EndedMember[] {
    return [...this.#ended.values()].filter(({ member }) => member.replica === replica)
  }

  /** Has a member wait for the receipt. */
  wait(ended: EndedMember): Promise<Ended> {
    return new Promise((resolve) => {
      this.#ended.set(ended.member.id, { ...ended, at: performance.now(), resolve })
    })
  }

  /** Lets members go, all of them if none are named, with what their `end` comes to. */
  settle(ended: Ended | Promise<Ended>, members = this.#members): void {
    for (const { id } of members) {
      this.#ended.get(id)?.resolve(ended)
      this.#ended.delete(id)
    }
  }

  /** A member is lost: its `end` is forgotten. */
  leave(member: Member): void {
    if (this.#ended.get(member.id)?.member === member) this.settle(undefined, [member])
  }

  get #members(): readonly Pick<Member, 'id'>[] {
    return [...this.#ended.values()].map(({ member }) => member)
  }
}
