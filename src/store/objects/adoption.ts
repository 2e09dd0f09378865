import assert from 'node:assert'
import type { Identity } from '../identity.js'
import { removeAll } from './checkpoint-objects.js'
import { type Objects, StoreError } from './objects.js'
import type { ObjectsAddress } from './open-objects.js'
import { type IndexedCheckpoint, openIndex, type RunIndex } from './run-index.js'
import { withEach } from './with-each.js'

/** The place of another process, which nobody but that process writes to. */
export type Source = { readonly objects: Objects; readonly address: ObjectsAddress }

/** Where a run is copied to: objects of this process, and a new folder in them for each checkpoint. */
export type Target = {
  readonly objects: Objects
  /** Before all keys of the run, in either place. */
  readonly prefix: string
  folderOf(checkpoint: string): string
}

/** What counts of a run, as it is after it was copied. */
export type Adopted = { readonly identity: Identity; readonly checkpoints: IndexedCheckpoint[] }

const COPIES_AT_A_TIME = 16
/** So often a copy may be overtaken by new checkpoints. A shard that has lost its whole takes no more of them. */
const PASSES = 20

/** A run that is copied from the place of another process, which may be alive and go on there. */
export class Adoption {
  readonly #source: Source
  readonly #target: Target
  readonly #run: string
  /** Where each folder of the other place was copied to. */
  readonly #copied = new Map<string, string>()

  constructor(source: Source, target: Target, run: string) {
    this.#source = source
    this.#target = target
    this.#run = run
  }

  /**
   * Copies the run. What `run.json` names both before and after a copy was whole meanwhile. Undefined where there is no
   * such run. Throws StoreError and UnreadableError. What was copied for nothing is removed.
   */
  async copy(): Promise<Adopted | undefined> {
    try {
      for (let pass = 0; pass < PASSES; pass++) {
        const index = await this.#readIndex()
        const named = index?.checkpoints ?? []
        await this.#discard(new Set(named.map(({ folder }) => folder)))
        if (index === undefined) return undefined
        const fresh = named.filter(({ folder }) => !this.#copied.has(folder))
        if (fresh.length === 0) return { identity: index.identity, checkpoints: named.map((one) => this.#placed(one)) }
        await this.#copyAll(fresh)
      }
      throw new StoreError(`${this.#name} had other checkpoints ${PASSES} times in a row`)
    } catch (error) {
      await this.#discard(new Set()).catch(() => undefined)
      throw error
    }
  }

  get #name(): string {
    return `${this.#source.objects.name}/${this.#target.prefix}`
  }

  async #readIndex(): Promise<RunIndex | undefined> {
    const found = await this.#source.objects.get(`${this.#target.prefix}run.json`)
    if (found === undefined) return undefined
    const index = openIndex(found.bytes, `${this.#name}run.json`, this.#run)
    return index.deleted ? undefined : index
  }

  async #copyAll(fresh: readonly IndexedCheckpoint[]): Promise<void> {
    const { objects, prefix, folderOf } = this.#target
    const keys: { from: string; to: string }[] = []
    for (const { folder, checkpoint } of fresh) {
      const to = folderOf(checkpoint)
      this.#copied.set(folder, to)
      const before = `${prefix}${folder}/`
      for await (const from of this.#source.objects.list(before))
        keys.push({ from, to: `${prefix}${to}/${from.slice(before.length)}` })
    }
    // An object that has gone meanwhile is one of a checkpoint that `run.json` names no more.
    await withEach(keys, COPIES_AT_A_TIME, async ({ from, to }) => {
      await objects.copyFrom(this.#source.address, from, to)
    })
  }

  #placed(entry: IndexedCheckpoint): IndexedCheckpoint {
    const folder = this.#copied.get(entry.folder)
    assert(folder, 'what is named was copied')
    return { ...entry, folder }
  }

  /** Removes what was copied, but for what the other place still names. */
  async #discard(named: ReadonlySet<string>): Promise<void> {
    for (const [folder, to] of this.#copied) {
      if (named.has(folder)) continue
      await removeAll(this.#target.objects, `${this.#target.prefix}${to}/`)
      this.#copied.delete(folder)
    }
  }
}
