import assert from 'node:assert'
import { removeAll } from './checkpoint-objects.js'
import { type Objects, StoreError } from './objects.js'
import type { ObjectsAddress } from './open-objects.js'
import { openIndex, type RunIndex } from './run-index.js'
import { withEach } from './with-each.js'

/** The place of another process, which nobody but that process writes to. */
export type Source = { readonly objects: Objects; readonly address: ObjectsAddress }

/** Where a run is copied to: objects of this process, and a new folder in them for each checkpoint. */
export type Target = {
  readonly objects: Objects
  /** Before all keys of the run, in either place. */
  readonly prefix: string
  folderOf(checkpoint: string): string
  /** The folder for the journal. */
  readonly journal: string
}

/** What counts of a run, as it is after it was copied. */
export type Adopted = Pick<RunIndex, 'identity' | 'checkpoints' | 'journal'>

const COPIES_AT_A_TIME = 16
/** So often a copy may be overtaken by new checkpoints. A shard that has lost its whole takes no more of them. */
const PASSES = 20

/** A run that is copied from the place of another process, which may be alive and go on there. */
export class Adoption {
  readonly #source: Source
  readonly #target: Target
  readonly #run: string
  /** Where each folder of the other place was copied to: those of checkpoints, and that of the journal. */
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
        await this.#discard(new Set([...named.map(({ folder }) => folder), ...(index ? [index.journal] : [])]))
        if (index === undefined) return undefined
        const fresh = new Map(named.map(({ folder, checkpoint }) => [folder, checkpoint]))
        for (const folder of this.#copied.keys()) fresh.delete(folder)
        if (this.#copied.has(index.journal) && fresh.size === 0) return this.#adopted(index)
        await this.#copyFolder(index.journal, this.#target.journal)
        for (const [folder, checkpoint] of fresh) await this.#copyFolder(folder, this.#target.folderOf(checkpoint))
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

  /** Copies what is in a folder, and is not in the copy of it that a pass before has made. */
  async #copyFolder(folder: string, to: string): Promise<void> {
    const { objects, prefix } = this.#target
    this.#copied.set(folder, to)
    const [before, after] = [`${prefix}${folder}/`, `${prefix}${to}/`]
    const there = new Set<string>()
    for await (const key of objects.list(after)) there.add(key.slice(after.length))
    const files: string[] = []
    for await (const key of this.#source.objects.list(before)) files.push(key.slice(before.length))
    // An object that has gone meanwhile is one that counts no more.
    await withEach(
      files.filter((file) => !there.has(file)),
      COPIES_AT_A_TIME,
      async (file) => void (await objects.copyFrom(this.#source.address, before + file, after + file)),
    )
  }

  #adopted({ identity, checkpoints, journal }: RunIndex): Adopted {
    const placed = (folder: string) => {
      const to = this.#copied.get(folder)
      assert(to, 'what is named was copied')
      return to
    }
    const entries = checkpoints.map((entry) => ({ ...entry, folder: placed(entry.folder) }))
    return { identity, checkpoints: entries, journal: placed(journal) }
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
