import { randomUUID } from 'node:crypto'
import { lstat, readFile, rename, rm, unlink } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import type { StateLocation } from '../device/state-access.js'
import { errorText } from '../errors.js'
import { branchFolder, prune } from './branches.js'
import type { CheckpointFiles } from './checkpoint/checkpoint-files.js'
import {
  branchesOnDisk,
  type CheckpointEntry,
  CheckpointList,
  entryOf,
  MANIFEST,
  readCheckpoints,
  readManifest,
} from './checkpoint/checkpoint-list.js'
import {
  type DeviceRecord,
  FORMAT,
  type Manifest,
  type RunRecord,
  sealManifest,
  UnreadableError,
} from './checkpoint/manifest.js'
import type { StateEntry, TensorLocation } from './checkpoint/state-files.js'
import { hasCode, makeFolder, replaceFile, syncFolder } from './durable.js'
import { type Identity, newIdentity, openIdentity, sealIdentity } from './identity.js'
import { clearJournal, listSegments } from './journal/journal.js'
import { segmentsAfter } from './journal/journal-reader.js'

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

const IDENTITY = 'run.json'

/**
 * The folder of one run: `run.json`, `checkpoints/step-000000001200/` and `journal/`, and the same two folders in
 * `branches/1/` once the run has gone back. A checkpoint counts once it has its manifest. After a restart the run goes
 * on from the newest checkpoint of the branch that `run.json` names, and the journal behind it.
 */
export class RunFolder {
  readonly path: string
  readonly #files: CheckpointFiles
  #identity: Identity
  #list: CheckpointList

  private constructor(path: string, files: CheckpointFiles, of: { identity: Identity; entries: CheckpointEntry[] }) {
    this.path = path
    this.#files = files
    this.#identity = of.identity
    this.#list = new CheckpointList(of.entries, of.identity)
  }

  static async create(path: string, files: CheckpointFiles, run: string): Promise<RunFolder> {
    await makeFolder(path)
    await makeFolder(join(path, 'checkpoints'))
    await makeFolder(join(path, 'journal'))
    const folder = new RunFolder(path, files, { identity: newIdentity(run), entries: [] })
    await folder.identify({})
    await syncFolder(dirname(path))
    return folder
  }

  /**
   * Lists what is there and, unless `tidy` is false, removes what a crash left unfinished. Throws UnreadableError for a
   * symbolic link, and for a `run.json` that is not what was written.
   */
  static async open(path: string, files: CheckpointFiles, { tidy = true } = {}): Promise<RunFolder> {
    await refuseLink(path)
    const entries = await readCheckpoints(path, { tidy })
    return new RunFolder(path, files, { identity: await readIdentity(path, entries.length === 0), entries })
  }

  get identity(): Identity {
    return this.#identity
  }

  get journal(): string {
    return join(branchFolder(this.path, this.#identity.branch), 'journal')
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

  /** Writes `run.json` with what has changed of it. */
  async identify(change: Partial<Identity>): Promise<void> {
    const identity = { ...this.#identity, ...change }
    await replaceFile(join(this.path, IDENTITY), sealIdentity(identity))
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
    const folder = this.#folderOf({ checkpoint, branch })
    const written = await this.#files.write({ folder, locations, manifest, entries, file_bytes }, released)
    const entry = entryOf(written, branch)
    this.#changed([...this.#list.entries, entry])
    return entry
  }

  /** Reads a checkpoint's manifest. Throws UnreadableError, also where it is of another run or checkpoint. */
  manifest(entry: CheckpointEntry): Promise<Manifest> {
    return readManifest(this.#folderOf(entry), basename(this.path))
  }

  /** Reads a checkpoint's tensors into `targets`, by name, and checks every file's hash. Throws UnreadableError. */
  read(
    entry: CheckpointEntry,
    { files }: Manifest,
    { targets, locations }: { targets: Targets; locations: readonly StateLocation[] },
  ): Promise<void> {
    return this.#files.read({ folder: this.#folderOf(entry), files, targets, locations })
  }

  /** Adds a tag to a checkpoint. */
  async tag(entry: CheckpointEntry, tag: string): Promise<CheckpointEntry> {
    if (entry.tags.includes(tag)) return entry
    const manifest = { ...(await this.manifest(entry)), tags: [...entry.tags, tag] }
    await replaceFile(join(this.#folderOf(entry), MANIFEST), sealManifest(manifest))
    const tagged = entryOf(manifest, entry.branch)
    this.#changed(this.#list.entries.map((other) => (other.checkpoint === entry.checkpoint ? tagged : other)))
    return tagged
  }

  /** Removes all checkpoints of the present history but its `kept` newest and those that a tag leads to. */
  async retain(kept: number): Promise<void> {
    for (const entry of this.#list.superfluous(kept)) await this.remove(entry)
  }

  /**
   * Has the run go on from a checkpoint, on a new branch where anything came after that. A crash leaves it where it was
   * or there: one file says on which branch it is. `sweep` then removes what nobody can go to any more.
   */
  async goBack(entry: CheckpointEntry): Promise<void> {
    if (entry.checkpoint === this.newest?.checkpoint && !(await this.#mayHaveStepsAfter(entry.step)))
      return this.identify({ replacement: undefined })
    const { branch, branches } = this.#identity
    const next = { branch: branch + 1, parent: entry.branch, checkpoint: entry.checkpoint }
    await this.#makeBranch(next.branch)
    await this.identify({ branch: next.branch, branches: [...branches, next], replacement: undefined })
  }

  /** Whether the journal may have steps after this one. */
  async #mayHaveStepsAfter(step: number): Promise<boolean> {
    return segmentsAfter(await listSegments(this.journal), step).some(({ bytes }) => bytes > 0)
  }

  /**
   * Removes what going back has left without a use: checkpoints of other branches to which no tag leads, the newest
   * first, and their journals.
   */
  async sweep(): Promise<void> {
    for (const entry of this.#list.abandoned()) await this.remove(entry)
    const left = new Set(this.#list.entries.map(({ branch }) => branch))
    for (const branch of await branchesOnDisk(this.path)) {
      if (branch === this.#identity.branch) continue
      const folder = branchFolder(this.path, branch)
      if (branch === 0 || left.has(branch)) await clearJournal(join(folder, 'journal'))
      else await rm(folder, { recursive: true })
    }
    const branches = prune(this.#identity, left)
    if (branches.length < this.#identity.branches.length) await this.identify({ branches })
  }

  /** Removes a checkpoint, its manifest first: without one it does not count, whatever a crash leaves of it. */
  async remove(entry: CheckpointEntry): Promise<void> {
    const folder = this.#folderOf(entry)
    await unlink(join(folder, MANIFEST))
    await syncFolder(folder)
    this.#changed(this.#list.entries.filter(({ checkpoint }) => checkpoint !== entry.checkpoint))
    await rm(folder, { recursive: true })
  }

  /** Makes the folders of a branch, which are there after a crash too once this resolves. */
  async #makeBranch(branch: number): Promise<void> {
    const folder = branchFolder(this.path, branch)
    for (const name of ['checkpoints', 'journal']) await makeFolder(join(folder, name))
    for (const parent of [folder, dirname(folder), this.path]) await syncFolder(parent)
  }

  #changed(entries: readonly CheckpointEntry[]): void {
    this.#list = new CheckpointList(entries, this.#identity)
  }

  #folderOf({ branch, checkpoint }: Pick<CheckpointEntry, 'branch' | 'checkpoint'>): string {
    return join(branchFolder(this.path, branch), 'checkpoints', checkpoint)
  }
}

export type Targets = ReadonlyMap<string, TensorLocation & { dtype: string; shape: readonly number[] }>

/** Throws UnreadableError where the folder of a run is a symbolic link. */
export async function refuseLink(path: string): Promise<void> {
  if (!(await lstat(path)).isSymbolicLink()) return
  throw new UnreadableError(`${path} is a symbolic link: the same folder may be another run's, or another service's`)
}

/** Removes a run from the disk. After a crash the run is there as a whole or not at all: renaming is atomic. */
export async function destroyRun(path: string): Promise<void> {
  const doomed = join(dirname(path), `.deleted-${randomUUID()}`)
  await rename(path, doomed)
  await syncFolder(dirname(path))
  await rm(doomed, { recursive: true })
}

/** Reads `run.json`. A run whose making was interrupted, which has no checkpoint, may have none. */
export async function readIdentity(folder: string, isUnfinished = false): Promise<Identity> {
  const path = join(folder, IDENTITY)
  try {
    return openIdentity(await readFile(path, 'utf8'), path, basename(folder))
  } catch (error) {
    if (error instanceof UnreadableError) throw error
    if (isUnfinished && hasCode(error, 'ENOENT')) return newIdentity(basename(folder))
    throw new UnreadableError(`${path} cannot be read: ${errorText(error)}`)
  }
}
