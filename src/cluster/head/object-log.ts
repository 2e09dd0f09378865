import { errorText, ServiceError } from '../../errors.js'
import { UnreadableError } from '../../store/checkpoint/manifest.js'
import { type Objects, StoreError } from '../../store/objects/objects.js'
import type { Entry } from '../commit-log.js'
import type { StoredLog } from './whole-store.js'
import { openEntry, sealEntry } from './whole-texts.js'

/** So many digits has a position in a key, so that keys are in the order of the positions. */
const DIGITS = 12

/**
 * A log as objects, one for each position, each written where there is none: of all heads that put an entry at one
 * position exactly one does.
 */
export class ObjectLog implements StoredLog {
  readonly isDurable = true
  readonly #objects: Objects
  readonly #prefix: string
  /** The last entry that this process has seen. */
  #seen: Entry | undefined
  #last: Promise<unknown> = Promise.resolve()

  /** `prefix` is the beginning of every key of the log, and of no other. */
  constructor(objects: Objects, prefix: string) {
    this.#objects = objects
    this.#prefix = prefix
  }

  put(entry: Entry): Promise<Entry> {
    const put = this.#last.then(() => told(this.#put(entry)))
    this.#last = put.catch(() => undefined)
    return put
  }

  /** Throws CHECKPOINT_UNREADABLE for an object that is not the entry of its position, and for one that is missing. */
  read(position: number): Promise<Entry | undefined> {
    return told(this.#read(position))
  }

  newest(): Promise<Entry | undefined> {
    return told(this.#findNewest())
  }

  async close(): Promise<void> {
    await this.#last
  }

  /** The key of the entry of a position. */
  keyOf(position: number): string {
    return `${this.#prefix}${String(position).padStart(DIGITS, '0')}`
  }

  async #put(entry: Entry): Promise<Entry> {
    const { position } = entry
    if (position > this.#position + 1 && (await this.#read(position - 1)) === undefined)
      throw new RangeError(`entry ${position} is put behind entry ${this.#position}: the log would have a gap`)
    // The bytes are of this head alone, which is why a write whose answer was lost is known to be its own.
    const isOurs = await this.#objects.putIfAbsent(this.keyOf(position), Buffer.from(sealEntry(entry)))
    if (isOurs) return this.#saw(entry)
    const standing = await this.#read(position)
    if (standing) return standing
    throw new StoreError(`${this.#nameOf(position)} was not written, and is not there: put it again`)
  }

  async #read(position: number): Promise<Entry | undefined> {
    if (position < 1) return undefined
    const found = await this.#objects.get(this.keyOf(position))
    if (found) return this.#saw(openEntry(found.bytes.toString(), position, this.#nameOf(position)))
    if (position > this.#position) return undefined
    throw new UnreadableError(`${this.#nameOf(position)} is missing, and there is entry ${this.#position}`)
  }

  async #findNewest(): Promise<Entry | undefined> {
    let last = this.#position
    for (;;) {
      const next = await this.#firstAfter(last)
      if (next === undefined) return last === 0 ? undefined : this.#read(last)
      if (next !== this.keyOf(last + 1))
        throw new UnreadableError(`${this.#nameOf(last + 1)} is missing, and there is ${next}`)
      last = await this.#search(last + 1)
    }
  }

  async #firstAfter(position: number): Promise<string | undefined> {
    for await (const key of this.#objects.list(this.#prefix, this.keyOf(position))) return key
    return undefined
  }

  /** The last position of those without a gap behind one that is there, found in twice its logarithm of requests. */
  async #search(there: number): Promise<number> {
    let [last, step] = [there, 1]
    for (; await this.#isThere(last + step); step *= 2) last += step
    for (step /= 2; step >= 1; step /= 2) if (await this.#isThere(last + step)) last += step
    return last
  }

  async #isThere(position: number): Promise<boolean> {
    return (await this.#objects.size(this.keyOf(position))) !== undefined
  }

  get #position(): number {
    return this.#seen?.position ?? 0
  }

  #saw(entry: Entry): Entry {
    if (entry.position > this.#position) this.#seen = entry
    return entry
  }

  #nameOf(position: number): string {
    return `${this.#objects.name}/${this.keyOf(position)}`
  }
}

/** The end of work with a store of objects, by the errors that clients are told. */
export async function told<T>(work: Promise<T>): Promise<T> {
  return work.catch((error) => {
    if (error instanceof UnreadableError) throw new ServiceError('CHECKPOINT_UNREADABLE', errorText(error))
    if (error instanceof StoreError) throw new ServiceError('STORAGE_FAILED', errorText(error))
    throw error
  })
}
