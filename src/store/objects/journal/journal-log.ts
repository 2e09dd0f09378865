import { UnreadableError } from '../../checkpoint/manifest.js'
import { readingAhead } from '../../file-bytes.js'
import type { StoredStep } from '../../journal/journal-reader.js'
import { openObject } from '../checkpoint-objects.js'
import { type Objects, StoreError } from '../objects.js'
import { withEach } from '../with-each.js'
import { type EntryHead, encodeEntryHead, HEAD_BYTES, readEntryHead, readStep } from './journal-entry.js'

/** An entry at its position, from 1 on. */
type Placed = EntryHead & { readonly position: number }

type Means = {
  readonly objects: Objects
  /** Of this service: higher than that of any before. */
  readonly generation: number
  /** Before the keys of all that is in the journal: it ends with '/'. */
  readonly prefix: string
}

const POSITION = /^\d{12}$/
const DATA = 'data/'
const READS_AT_A_TIME = 16

/**
 * The journal of a run, of all its branches, as objects `000000000012`, one for each entry, by its position. A position
 * is written where there is nothing. A service that takes the run writes a `fence` behind the last entry, and so one of
 * before, which may still be alive, finds its next position taken. For that to be so always, a fence is never removed
 * as long as the run is there; the entries of steps that are in a checkpoint are.
 */
export class JournalLog {
  readonly #means: Means
  #entries: Placed[] = []
  #next = 1
  /** The last write failed, and may have written all the same. */
  #isUncertain = false

  constructor(means: Means) {
    this.#means = means
  }

  /**
   * Reads which entries there are. With `fence` nothing of a service with a lower generation comes behind them, and
   * what that has left unfinished is removed. Throws StoreError and UnreadableError.
   */
  async load({ fence }: { fence: boolean }): Promise<void> {
    for (;;) {
      const data = await this.#list()
      if (!fence) return
      if (!(await this.#write(this.#own('fence', 0), []))) continue
      const named = new Set(this.#entries.map((entry) => entry.data))
      await this.#means.objects.delete(data.filter((name) => !named.has(name)).map((name) => this.#keyOf(name)))
      return
    }
  }

  get generation(): number {
    return this.#means.generation
  }

  /** Begins the object of the gradients of a step; its name is new. */
  upload(name: string, bytes: number) {
    return this.#means.objects.upload(this.#keyOf(name), bytes)
  }

  /** A name that no other service and no other attempt gives an object of gradients. */
  dataName(number: number): string {
    return `${DATA}${this.#next}.${this.generation}.${number}`
  }

  /** Bytes of the steps of a branch after a step. */
  bytesAfter(branch: number, step: number): number {
    return this.#after(branch, step).reduce((sum, { records, gradients }) => sum + records + gradients, 0)
  }

  /** Whether a branch may have steps after this one. */
  mayHaveSteps(branch: number, after: number): boolean {
    return this.#isUncertain || this.#after(branch, after).length > 0
  }

  /** Writes a finished step. Throws StoreError, and then it may be there. */
  async put(head: EntryHead, parts: readonly Uint8Array[]): Promise<void> {
    this.#isUncertain = true
    if (!(await this.#write(head, parts))) throw this.#taken()
    this.#isUncertain = false
  }

  /** The finished steps of a branch after `step`, in order. Throws UnreadableError where one is missing. */
  async read(branch: number, step: number): Promise<StoredStep[]> {
    const entries = this.#after(branch, step)
    for (const [i, entry] of entries.entries())
      if (entry.step !== step + 1 + i)
        throw new UnreadableError(`${this.#nameOf(entry)} is step ${entry.step}, expected is step ${step + 1 + i}`)
    const steps: StoredStep[] = []
    await withEach(entries, READS_AT_A_TIME, async (entry) => {
      steps.push(await this.#read(entry))
    })
    return steps.sort((one, other) => one.step - other.step)
  }

  /** Removes the steps of a branch up to this one. */
  drop(branch: number, until: number): Promise<void> {
    return this.#remove((entry) => entry.branch === branch && entry.step <= until)
  }

  /** Has the steps of a branch count no more, and removes them. */
  async clear(branch: number): Promise<void> {
    if (!this.mayHaveSteps(branch, 0)) return
    if (!(await this.#write(this.#own('clear', branch), []))) throw this.#taken()
    this.#isUncertain = false
    await this.#remove((entry) => entry.branch === branch)
  }

  /** Removes the steps of all branches but one. */
  clearOthers(present: number): Promise<void> {
    return this.#remove((entry) => entry.branch !== present)
  }

  #own(kind: EntryHead['kind'], branch: number): EntryHead {
    return { kind, generation: this.generation, branch, step: 0, records: 0, gradients: 0 }
  }

  /** The steps of a branch that count, after one. */
  #after(branch: number, step: number): Placed[] {
    const own = this.#entries.filter((entry) => entry.branch === branch && entry.kind !== 'fence')
    const cleared = own.findLastIndex(({ kind }) => kind === 'clear')
    return own.slice(cleared + 1).filter((entry) => entry.step > step)
  }

  /** Reads the heads of all entries; answers the names of the objects with gradients. */
  async #list(): Promise<string[]> {
    const { objects, prefix } = this.#means
    const keys: string[] = []
    for await (const key of objects.list(prefix)) keys.push(key.slice(prefix.length))
    const entries: Placed[] = []
    const positions = keys.filter((key) => POSITION.test(key)).map(Number)
    await withEach(positions, READS_AT_A_TIME, async (position) => {
      const bytes = Buffer.alloc(HEAD_BYTES)
      await objects.readInto(bytes, this.#keyOf(nameOf(position)), 0)
      entries.push({ ...readEntryHead(bytes, `${objects.name}/${this.#keyOf(nameOf(position))}`), position })
    })
    this.#entries = entries.sort((one, other) => one.position - other.position)
    this.#next = (this.#entries.at(-1)?.position ?? 0) + 1
    return keys.filter((key) => key.startsWith(DATA))
  }

  /** Writes the next entry; false where another service has written at its position. */
  async #write(head: EntryHead, parts: readonly Uint8Array[]): Promise<boolean> {
    const { objects, generation } = this.#means
    const key = this.#keyOf(nameOf(this.#next))
    const bytes = Buffer.concat([encodeEntryHead(head), ...parts])
    if (!(await objects.putIfAbsent(key, bytes))) {
      const found = await objects.get(key)
      const isOurs = found && readEntryHead(found.bytes.subarray(0, HEAD_BYTES), key).generation === generation
      // It was written by an attempt of ours that has failed for all that was known, and has never counted.
      if (!isOurs || !(await objects.putIfUnchanged(key, bytes, found.version))) return false
    }
    this.#entries.push({ ...head, position: this.#next })
    this.#next += 1
    return true
  }

  async #read(entry: Placed): Promise<StoredStep> {
    const { objects } = this.#means
    const own = this.#keyOf(nameOf(entry.position))
    const label = this.#nameOf(entry)
    const records = Buffer.alloc(entry.records)
    await objects.readInto(records, own, HEAD_BYTES)
    const key = entry.data === undefined ? own : this.#keyOf(entry.data)
    const at = entry.data === undefined ? HEAD_BYTES + entry.records : 0
    const open = async () => readingAhead(await openObject(objects, key))
    return readStep(records, entry, { path: `${objects.name}/${key}`, at, open }, label)
  }

  /** Removes steps, the newest first: a crash in between leaves steps without a gap. */
  async #remove(isOld: (entry: Placed) => boolean): Promise<void> {
    const old = this.#entries.filter((entry) => entry.kind === 'step' && isOld(entry))
    this.#entries = this.#entries.filter((entry) => !old.includes(entry))
    const names = old.flatMap(({ position, data }) => [nameOf(position), ...(data === undefined ? [] : [data])])
    await this.#means.objects.delete(names.map((name) => this.#keyOf(name)))
  }

  #keyOf(name: string): string {
    return this.#means.prefix + name
  }

  #nameOf({ position }: Placed): string {
    return `${this.#means.objects.name}/${this.#keyOf(nameOf(position))}`
  }

  #taken(): StoreError {
    const { objects, prefix, generation } = this.#means
    return new StoreError(
      `${objects.name}/${prefix} was taken by another service, this one has generation ${generation}`,
    )
  }
}

function nameOf(position: number): string {
  return String(position).padStart(12, '0')
}
