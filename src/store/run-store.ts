import type { StateLocation } from '../device/state-access.js'
import { prune } from './branches.js'
import { type CheckpointEntry, CheckpointList, entryOf } from './checkpoint/checkpoint-list.js'
import { type DeviceRecord, FORMAT, type Manifest, type RunRecord } from './checkpoint/manifest.js'
import type { StateEntry } from './checkpoint/state-files.js'
import { type Identity, newIdentity } from './identity.js'
import type { Journal, JournalOptions } from './journal/journal.js'
import type { StoredStep, Tail } from './journal/journal-reader.js'
import type { RunMedium, RunRecords, Targets } from './run-medium.js'

/** A checkpoint to be written. */
export type Snapshot = {
  tags: readonly string[]
  server: string
  device: DeviceRecord
  record: RunRecord
  entries: readonly StateEntry[]
  locations: readonly StateLocation[]
  /** Most bytes of tensors in a file, unless one tensor alone has more. */
  file_bytes: number
}

/**
 * What is kept of one run, wherever it lies: its identity, its checkpoints and its journal. After a restart the run
 * goes on from the newest checkpoint of the branch that its identity names, and the journal behind it.
 */
export class RunStore {
  readonly #medium: RunMedium
  #identity: Identity
  #list: CheckpointList

  private constructor(medium: RunMedium, { identity, entries }: RunRecords) {
    this.#medium = medium
    this.#identity = identity
    this.#list = new CheckpointList(entries, identity)
  }

  static async create(medium: RunMedium, run: string): Promise<RunStore> {
    const identity = newIdentity(run)
    await medium.create(identity)
    return new RunStore(medium, { identity, entries: [] })
  }

  /** Lists what is there, and unless `tidy` is false removes what a crash left unfinished. Throws UnreadableError. */
  static async open(medium: RunMedium, { tidy = true } = {}): Promise<RunStore> {
    return new RunStore(medium, await medium.read({ tidy }))
  }

  /** Where it lies, for messages and logs. */
  get path(): string {
    return this.#medium.path
  }

  get identity(): Identity {
    return this.#identity
  }

  /** Of all branches, the oldest step first. */
  get checkpoints(): readonly CheckpointEntry[] {
    return this.#list.entries
  }

  get newest(): CheckpointEntry | undefined {
    return this.#list.newest
  }

  /** Those of the history that the run has now, the oldest first. */
  get history(): readonly CheckpointEntry[] {
    return this.#list.history
  }

  /** Whether the run as it is now has gone through a checkpoint; not so for those of branches that it has left. */
  isInHistory(entry: CheckpointEntry): boolean {
    return this.#list.history.some(({ checkpoint }) => checkpoint === entry.checkpoint)
  }

  /** A checkpoint by its id, or the newest one with a tag: of the present history where that has one. */
  find(name: string): CheckpointEntry | undefined {
    return this.#list.find(name)
  }

  /** Writes what has changed of the run's identity. */
  async identify(change: Partial<Identity>): Promise<void> {
    const identity = { ...this.#identity, ...change }
    await this.#medium.writeIdentity(identity)
    this.#identity = identity
    this.#changed(this.#list.entries)
  }

  /**
   * Writes a checkpoint; `released` is told from time to time how many of the entries have memory that is not read any
   * more.
   */
  async write(snapshot: Snapshot, released: (entries: number) => void): Promise<CheckpointEntry> {
    const { record, entries, locations, tags, server, device, file_bytes } = snapshot
    const { branch } = this.#identity
    const checkpoint = this.#list.freshId(record.step, record.imported !== undefined)
    const manifest = {
      ...{ format: FORMAT, checkpoint, tags, written_at: new Date().toISOString(), server, device },
      ...record,
    }
    const written = await this.#medium.writeCheckpoint(branch, { locations, manifest, entries, file_bytes }, released)
    const entry = entryOf(written, branch)
    this.#changed([...this.#list.entries, entry])
    return entry
  }

  /** Reads a checkpoint's manifest. Throws UnreadableError, also where it is of another run or checkpoint. */
  manifest(entry: CheckpointEntry): Promise<Manifest> {
    return this.#medium.readManifest(entry)
  }

  /** Reads a checkpoint's tensors into `targets`, by name, and checks every file's hash. Throws UnreadableError. */
  read(
    entry: CheckpointEntry,
    { files }: Manifest,
    { targets, locations }: { targets: Targets; locations: readonly StateLocation[] },
  ): Promise<void> {
    return this.#medium.readTensors(entry, { files, targets, locations })
  }

  /** Adds a tag to a checkpoint. */
  async tag(entry: CheckpointEntry, tag: string): Promise<CheckpointEntry> {
    if (entry.tags.includes(tag)) return entry
    const tagged = await this.#medium.writeTags(entry, [...entry.tags, tag])
    this.#changed(this.#list.entries.map((other) => (other.checkpoint === entry.checkpoint ? tagged : other)))
    return tagged
  }

  /** Removes all checkpoints of the present history but its `kept` newest and those that a tag leads to. */
  async retain(kept: number): Promise<void> {
    for (const entry of this.#list.superfluous(kept)) await this.remove(entry)
  }

  /**
   * Has the run go on from a checkpoint, on a new branch where anything came after that. A crash leaves it where it was
   * or there: the identity alone says on which branch it is. `sweep` then removes what nobody can go to any more.
   */
  async goBack(entry: CheckpointEntry): Promise<void> {
    const { branch, branches } = this.#identity
    if (entry.checkpoint === this.newest?.checkpoint && !(await this.#medium.mayHaveSteps(branch, entry.step)))
      return this.identify({ replacement: undefined })
    const next = { branch: branch + 1, parent: entry.branch, checkpoint: entry.checkpoint }
    await this.#medium.makeBranch(next.branch)
    await this.identify({ branch: next.branch, branches: [...branches, next], replacement: undefined })
  }

  /**
   * Removes what going back has left without a use: checkpoints of other branches to which no tag leads, the newest
   * first, and their journals.
   */
  async sweep(): Promise<void> {
    for (const entry of this.#list.abandoned()) await this.remove(entry)
    const left = new Set(this.#list.entries.map(({ branch }) => branch))
    await this.#medium.clearBranches(this.#identity.branch, left)
    const branches = prune(this.#identity, left)
    if (branches.length < this.#identity.branches.length) await this.identify({ branches })
  }

  async remove(entry: CheckpointEntry): Promise<void> {
    await this.#medium.forgetCheckpoint(entry)
    this.#changed(this.#list.entries.filter(({ checkpoint }) => checkpoint !== entry.checkpoint))
    await this.#medium.clearCheckpoint(entry)
  }

  /** Begins the journal of the present branch anew behind what it has. */
  openJournal(options: JournalOptions & { first: number }): Promise<Journal> {
    return this.#medium.openJournal(this.#identity.branch, options)
  }

  /** The finished steps after `step` in the journal of the present branch. Throws UnreadableError. */
  readJournal(step: number): Promise<{ steps: StoredStep[]; tail?: Tail }> {
    return this.#medium.readJournal(this.#identity.branch, step)
  }

  /** Whether the journal of the present branch has anything. */
  hasSteps(): Promise<boolean> {
    return this.#medium.mayHaveSteps(this.#identity.branch, 0)
  }

  clearJournal(): Promise<void> {
    return this.#medium.clearJournal(this.#identity.branch)
  }

  #changed(entries: readonly CheckpointEntry[]): void {
    this.#list = new CheckpointList(entries, this.#identity)
  }
}
