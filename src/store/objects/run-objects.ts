import type { CheckpointFiles, Writing } from '../checkpoint/checkpoint-files.js'
import { type CheckpointEntry, entryOf, ownManifest } from '../checkpoint/checkpoint-list.js'
import { type CheckpointAddress, MANIFEST } from '../checkpoint/checkpoint-place.js'
import type { WrittenManifest } from '../checkpoint/checkpoint-thread.js'
import { FORMAT, type Manifest, openManifest, UnreadableError } from '../checkpoint/manifest.js'
import type { Identity } from '../identity.js'
import type { Journal, JournalOptions } from '../journal/journal.js'
import type { CheckpointKey, RunMedium, RunRecords } from '../run-medium.js'
import { type Adopted, Adoption, type Source } from './adoption.js'
import { removeAll } from './checkpoint-objects.js'
import { JournalLog } from './journal/journal-log.js'
import { ObjectJournal } from './journal/object-journal.js'
import { type Objects, StoreError, type Version } from './objects.js'
import type { ObjectsAddress } from './open-objects.js'
import {
  checkpointFolderOf,
  folderIn,
  type IndexedCheckpoint,
  journalFolderOf,
  openIndex,
  type RunIndex,
  sealIndex,
} from './run-index.js'

/** Where the objects of all runs are, and who writes there. */
export type ObjectsMeans = {
  readonly objects: Objects
  /** For the thread that writes checkpoints. */
  readonly address: ObjectsAddress
  readonly files: CheckpointFiles
  /** Of this service: higher than that of any before. */
  readonly generation: number
  /** A number that this service has not given a folder yet. */
  number(): number
}

/**
 * One run as objects: `run.json` says what counts, `checkpoints/step-000000001200@3.1/` has the files of a checkpoint.
 *
 * A service takes a run by writing its own generation into `run.json` on the condition that it is unchanged. From there
 * on every change of a service of before fails on the same condition, whatever it believes. Only the service that has
 * a run makes `run.json` name objects, and only ones of its own generation; so an object of a lower generation that is
 * not named by it never will be, and may be removed at any time by anybody who knows that.
 */
export class RunObjects implements RunMedium {
  readonly path: string
  readonly #means: ObjectsMeans
  readonly #run: string
  #known: { index: RunIndex; version: Version } | undefined
  #turn: Promise<unknown> = Promise.resolve()
  /** Folders of this generation that do not count: to be removed once `run.json` is known not to name them. */
  readonly #left: string[] = []
  /** Folders of checkpoints that count no more, by their ids. */
  readonly #forgotten = new Map<string, string>()
  #log: JournalLog | undefined

  constructor(means: ObjectsMeans, run: string) {
    this.#means = means
    this.#run = run
    this.path = `${means.objects.name}/runs/${run}`
  }

  async create(identity: Identity): Promise<void> {
    const { objects, generation, number } = this.#means
    const found = await objects.get(this.#key)
    const before = found && this.#open(found.bytes)
    // One of a lower generation was made by a service that was taken to be dead, after this one has listed the runs.
    // One without a checkpoint was made by this service, which has not heard of it.
    if (before?.generation === generation && before.checkpoints.length > 0)
      throw new StoreError(`${this.path} is there already`)
    const journal = journalFolderOf({ generation, number: number() })
    await this.#begin(
      { identity, checkpoints: [], journal },
      found && before && { index: before, version: found.version },
    )
    await this.#loadJournal({ fence: true })
  }

  /** Copies the run from the place of another process. Answers whether that has one. Throws as `Adoption.copy`. */
  async adopt(source: Source): Promise<boolean> {
    const { objects, generation, number } = this.#means
    const found = await objects.get(this.#key)
    const before = found && this.#open(found.bytes)
    if (before && !before.deleted) throw new StoreError(`${this.path} is there already`)
    const folderOf = (checkpoint: string) => checkpointFolderOf(checkpoint, { generation, number: number() })
    const journal = journalFolderOf({ generation, number: number() })
    const copied = await new Adoption(source, { objects, prefix: this.#prefix, folderOf, journal }, this.#run).copy()
    if (copied === undefined) return false
    await this.#begin(copied, found && before && { index: before, version: found.version })
    // A service of before may have died in the middle of a copy.
    await this.#collect()
    return true
  }

  /** With `tidy` the run is taken: no change of a service with a lower generation counts any more. */
  async read({ tidy }: { tidy: boolean }): Promise<RunRecords> {
    const found = await this.#means.objects.get(this.#key)
    if (found === undefined) throw new UnreadableError(`${this.path} has no run.json`)
    const index = this.#open(found.bytes)
    this.#known = { index, version: found.version }
    if (tidy) {
      await this.#change((same) => same)
      await this.#collect()
    }
    await this.#loadJournal({ fence: tidy })
    return { identity: index.identity, entries: index.checkpoints.map(entryIn) }
  }

  /** Whether the run was deleted. Throws UnreadableError. */
  async isDeleted(): Promise<boolean> {
    const found = await this.#means.objects.get(this.#key)
    return found === undefined || this.#open(found.bytes).deleted === true
  }

  /** The name of the run is free once this resolves. What is left of its `run.json` are some hundred bytes. */
  async destroy(): Promise<void> {
    if (this.#known === undefined) await this.read({ tidy: true })
    await this.#change((index) => ({ ...index, deleted: true, checkpoints: [] }))
    await this.#collect({ own: true })
  }

  async writeIdentity(identity: Identity): Promise<void> {
    await this.#change((index) => ({ ...index, identity }))
  }

  async writeCheckpoint(
    branch: number,
    writing: Omit<Writing, 'address'>,
    released: (entries: number) => void,
  ): Promise<WrittenManifest> {
    const { files, generation, number } = this.#means
    const folder = checkpointFolderOf(writing.manifest.checkpoint, { generation, number: number() })
    const written = await files.write({ ...writing, address: this.#addressOf(folder) }, released)
    const { problem: _, ...entry } = { ...entryOf(written, branch), folder }
    await this.#change((index) => ({ ...index, checkpoints: [...index.checkpoints, entry] })).catch((error) => {
      // Whether it counts is known only after the next write that succeeds.
      this.#left.push(folder)
      throw error
    })
    return written
  }

  async readManifest(key: CheckpointKey): Promise<Manifest> {
    const { folder, tags } = this.#find(key)
    const path = `${this.path}/${folder}/${MANIFEST}`
    const found = await this.#means.objects.get(`${this.#prefix}${folder}/${MANIFEST}`)
    if (found === undefined) throw new UnreadableError(`${path} is missing`)
    const manifest = openManifest(found.bytes.toString(), path)
    return { ...ownManifest(manifest, path, { run: this.#run, checkpoint: key.checkpoint }), tags }
  }

  readTensors(key: CheckpointKey, of: Parameters<RunMedium['readTensors']>[1]): Promise<void> {
    return this.#means.files.read({ ...of, address: this.#addressOf(this.#find(key).folder) })
  }

  async writeTags(key: CheckpointKey, tags: readonly string[]): Promise<CheckpointEntry> {
    const tagged = (entry: IndexedCheckpoint) => (entry.checkpoint === key.checkpoint ? { ...entry, tags } : entry)
    await this.#change((index) => ({ ...index, checkpoints: index.checkpoints.map(tagged) }))
    return entryIn(this.#find(key))
  }

  async forgetCheckpoint(key: CheckpointKey): Promise<void> {
    const { folder } = this.#find(key)
    const isOther = ({ checkpoint }: IndexedCheckpoint) => checkpoint !== key.checkpoint
    await this.#change((index) => ({ ...index, checkpoints: index.checkpoints.filter(isOther) }))
    this.#forgotten.set(key.checkpoint, folder)
  }

  async clearCheckpoint({ checkpoint }: CheckpointKey): Promise<void> {
    const folder = this.#forgotten.get(checkpoint)
    await removeAll(this.#means.objects, `${this.#prefix}${folder}/`)
    this.#forgotten.delete(checkpoint)
  }

  /** A branch is a number in `run.json` and in the entries of the journal. */
  async makeBranch(): Promise<void> {}

  clearBranches(present: number): Promise<void> {
    return this.#journal.clearOthers(present)
  }

  clearJournal(branch: number): Promise<void> {
    return this.#journal.clear(branch)
  }

  async mayHaveSteps(branch: number, after: number): Promise<boolean> {
    return this.#journal.mayHaveSteps(branch, after)
  }

  async readJournal(branch: number, step: number): ReturnType<RunMedium['readJournal']> {
    return { steps: await this.#journal.read(branch, step) }
  }

  async openJournal(branch: number, options: JournalOptions): Promise<Journal> {
    return new ObjectJournal(this.#journal, branch, options)
  }

  get #journal(): JournalLog {
    if (this.#log) return this.#log
    /* c8 ignore next 2 -- a run is read or made before anything else */
    throw new StoreError(`${this.path} was not read`)
  }

  /** Reads what there is of the journal. With `fence` no service with a lower generation adds anything to that. */
  async #loadJournal(how: { fence: boolean }): Promise<void> {
    const { objects, generation } = this.#means
    const log = new JournalLog({ objects, generation, prefix: `${this.#prefix}${this.#present.index.journal}/` })
    await log.load(how)
    this.#log = log
  }

  /** Writes what counts of a run that begins here, in the place of `before`. */
  async #begin(counts: Adopted, before: { index: RunIndex; version: Version } | undefined): Promise<void> {
    const { objects, generation } = this.#means
    const index = { format: FORMAT, generation, writes: 0, ...counts }
    if (before === undefined) {
      const version = await objects.putIfAbsent(this.#key, sealIndex(index))
      if (version === undefined) throw this.#taken()
      this.#known = { index, version }
      return
    }
    this.#known = before
    await this.#change(({ writes }) => ({ ...index, writes, deleted: undefined }))
    await this.#collect()
  }

  get #prefix(): string {
    return `runs/${this.#run}/`
  }

  get #key(): string {
    return `${this.#prefix}run.json`
  }

  #addressOf(folder: string): CheckpointAddress {
    return { kind: 'objects', objects: this.#means.address, folder: `${this.#prefix}${folder}` }
  }

  #open(bytes: Buffer): RunIndex {
    const index = openIndex(bytes, `${this.path}/run.json`, this.#run)
    if (index.generation > this.#means.generation) throw this.#taken(index)
    return index
  }

  #find({ checkpoint }: CheckpointKey): IndexedCheckpoint {
    const found = this.#present.index.checkpoints.find((entry) => entry.checkpoint === checkpoint)
    if (found) return found
    /* c8 ignore next 2 -- who asks has it from here, and one alone removes something at a time */
    throw new StoreError(`${this.path} has no checkpoint '${checkpoint}'`)
  }

  get #present(): { index: RunIndex; version: Version } {
    if (this.#known) return this.#known
    /* c8 ignore next 2 -- a run is read or made before anything else */
    throw new StoreError(`${this.path} was not read`)
  }

  /** Writes `run.json`, one change after the other. Throws StoreError where another service has the run. */
  #change(change: (index: RunIndex) => RunIndex): Promise<void> {
    const turn = this.#turn.then(() => this.#write(change))
    this.#turn = turn.catch(() => undefined)
    return turn
  }

  async #write(change: (index: RunIndex) => RunIndex): Promise<void> {
    const { index, version } = this.#present
    const { generation, objects } = this.#means
    const next = { ...change(index), generation, writes: index.writes + 1 }
    const written = await objects.putIfUnchanged(this.#key, sealIndex(next), version)
    this.#known = written === undefined ? await this.#overOurs(next) : { index: next, version: written }
    const left = this.#left.splice(0)
    // Garbage takes room and nothing else: what cannot be removed now is removed when the run is taken again.
    await Promise.allSettled(left.map((folder) => removeAll(objects, `${this.#prefix}${folder}/`)))
  }

  /**
   * Writes over a version that was not expected: it may be of a write of ours that has failed for all we know. Throws
   * StoreError where it is another service's.
   */
  async #overOurs(index: RunIndex): Promise<{ index: RunIndex; version: Version }> {
    const { objects, generation } = this.#means
    const found = await objects.get(this.#key)
    const ours = found && this.#open(found.bytes)
    if (found === undefined || ours?.generation !== generation) throw this.#taken(ours)
    const next = { ...index, writes: ours.writes + 1 }
    const version = await objects.putIfUnchanged(this.#key, sealIndex(next), found.version)
    /* c8 ignore next -- between two requests of the only service that may write */
    if (version === undefined) throw this.#taken()
    return { index: next, version }
  }

  #taken(index?: RunIndex): StoreError {
    const by = index === undefined ? 'another service' : `a service of generation ${index.generation}`
    return new StoreError(`${this.path} was taken by ${by}, this one has generation ${this.#means.generation}`)
  }

  /** Removes what services with a lower generation have left; `own`: of this one, too. */
  async #collect({ own = false } = {}): Promise<void> {
    const { objects, generation } = this.#means
    const { checkpoints, journal, deleted } = this.#present.index
    const named = new Set([...checkpoints.map(({ folder }) => folder), ...(deleted ? [] : [journal])])
    const isGarbage = (key: string) => {
      const found = folderIn(key.slice(this.#prefix.length))
      return found !== undefined && !named.has(found.folder) && found.generation < generation + (own ? 1 : 0)
    }
    const keys: string[] = []
    for await (const key of objects.list(this.#prefix)) if (isGarbage(key)) keys.push(key)
    await objects.delete(keys)
    for await (const upload of objects.unfinished(this.#prefix)) if (isGarbage(upload.key)) await objects.abort(upload)
  }
}

function entryIn({ folder: _, ...entry }: IndexedCheckpoint): CheckpointEntry {
  return entry
}
