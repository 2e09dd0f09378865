import { isDeepStrictEqual } from 'node:util'
import type { ReceiptFrame } from '../wire/frame.js'

/** Where a whole is: its digest after `step`, that of each shard after it, and the step's receipt; step 0 has none. */
export type Standing = {
  readonly step: number
  readonly digest: string
  readonly shards: readonly string[]
  readonly receipt?: ReceiptFrame
}

/**
 * One entry of the log of a whole, the run that several processes share. Positions count from 1 without a gap.
 * - `begin`: a head has taken over with this generation, and the whole goes on after `step`. No head of an older
 *   generation can commit behind this entry, because the position that it would write is taken. Where `step` is below
 *   that of the entry before, the whole went back: the commits of later steps before this entry count no more.
 * - `commit`: `step` is finished.
 *
 * Either way the entry says where the whole is then, so that the newest entry alone is enough to go on. `head` is
 * another text for each time that a process becomes head: two heads never write equal entries.
 */
export type Entry = Standing & {
  readonly position: number
  readonly kind: 'begin' | 'commit'
  readonly generation: number
  readonly head: string
}

/**
 * The log of a whole: what its heads have committed, in order. `put` is the only call that safety rests on. It writes
 * an entry where its position is free, and changes nothing where it is taken; of any number of calls for one position,
 * at once or years apart, exactly one writes. A call that fails may have written: the caller puts the same entry again
 * and learns which one stands. So an entry may never be removed while a process may live that believes its position to
 * be free.
 *
 * The log is keyed by position and not by step: a whole that goes back to an earlier step commits later ones anew, and
 * a head that takes over has to close the log to its predecessor before it goes by what it has read.
 */
export interface CommitLog {
  /** Whether it outlives this process. A step is only as durable as its commit. */
  readonly isDurable: boolean
  /** Writes an entry if its position is free; answers with the one that stands there. */
  put(entry: Entry): Promise<Entry>
  read(position: number): Promise<Entry | undefined>
  /** The last entry, or one that was the last shortly before: `put` tells. */
  newest(): Promise<Entry | undefined>
}

/** Whether two entries are one. A log may be read from JSON, where a receipt's keys that are undefined are left out. */
export function isSameEntry(one: Entry, other: Entry): boolean {
  const { receipt: _, ...rest } = one
  const { receipt: __, ...otherRest } = other
  return isDeepStrictEqual(rest, otherRest)
}

/**
 * The entry of a step that a whole may go back to: the last one of that step up to `newest`. Undefined for a step that
 * the whole has not come to, or that lies before its first one.
 *
 * With each commit position and step grow by 1, and with each `begin` the position grows beyond the step: position less
 * step never falls. So no entry of `step` before one that is `ahead` of its own step by n is behind `step` + n, and a
 * log of a million steps is asked for one entry more than it has beginnings.
 */
export async function findStep(log: CommitLog, newest: Entry, step: number): Promise<Entry | undefined> {
  if (step > newest.step) return undefined
  let entry: Entry | undefined = newest
  while (entry && entry.step > step) {
    const ahead: number = entry.position - entry.step
    entry = await log.read(step + ahead)
  }
  return entry?.step === step ? entry : undefined
}

/** A log in this process's memory, for a whole of which nothing is kept: it ends with the process. */
export class MemoryLog implements CommitLog {
  readonly isDurable: boolean = false
  readonly #entries: Entry[] = []

  async put(entry: Entry): Promise<Entry> {
    const { length } = this.#entries
    if (entry.position > length + 1)
      throw new RangeError(`entry ${entry.position} is put behind entry ${length}: the log would have a gap`)
    if (entry.position === length + 1) this.#entries.push(entry)
    return this.#entries[entry.position - 1]
  }

  async read(position: number): Promise<Entry | undefined> {
    return this.#entries[position - 1]
  }

  async newest(): Promise<Entry | undefined> {
    return this.#entries.at(-1)
  }
}
