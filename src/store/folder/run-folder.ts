import { randomUUID } from 'node:crypto'
import { lstat, readFile, rename, rm, unlink } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { errorText } from '../../errors.js'
import { branchFolder } from '../branches.js'
import type { CheckpointFiles, Writing } from '../checkpoint/checkpoint-files.js'
import {
  branchesOnDisk,
  type CheckpointEntry,
  entryOf,
  readCheckpoints,
  readManifest,
} from '../checkpoint/checkpoint-list.js'
import { type CheckpointAddress, MANIFEST } from '../checkpoint/checkpoint-place.js'
import type { WrittenManifest } from '../checkpoint/checkpoint-thread.js'
import { type Manifest, sealManifest, UnreadableError } from '../checkpoint/manifest.js'
import { hasCode, makeFolder, replaceFile, syncFolder } from '../durable.js'
import { type Identity, newIdentity, openIdentity, sealIdentity } from '../identity.js'
import { clearJournal, FileJournal, type Journal, listSegments } from '../journal/journal.js'
import { readJournal, segmentsAfter } from '../journal/journal-reader.js'
import type { CheckpointKey, RunMedium, RunRecords } from '../run-medium.js'

const IDENTITY = 'run.json'

/**
 * The folder of one run: `run.json`, `checkpoints/step-000000001200/` and `journal/`, and the same two folders in
 * `branches/1/` once the run has gone back. A checkpoint counts once it has its manifest.
 */
export class RunFolder implements RunMedium {
  readonly path: string
  readonly #files: CheckpointFiles

  constructor(path: string, files: CheckpointFiles) {
    this.path = path
    this.#files = files
  }

  async create(identity: Identity): Promise<void> {
    await makeFolder(this.path)
    await makeFolder(join(this.path, 'checkpoints'))
    await makeFolder(this.journalOf(0))
    await this.writeIdentity(identity)
    await syncFolder(dirname(this.path))
  }

  /** Throws UnreadableError for a symbolic link, too. */
  async read({ tidy }: { tidy: boolean }): Promise<RunRecords> {
    await refuseLink(this.path)
    const entries = await readCheckpoints(this.path, { tidy })
    return { entries, identity: await readIdentity(this.path, entries.length === 0) }
  }

  writeIdentity(identity: Identity): Promise<void> {
    return replaceFile(join(this.path, IDENTITY), sealIdentity(identity))
  }

  writeCheckpoint(
    branch: number,
    writing: Omit<Writing, 'address'>,
    released: (entries: number) => void,
  ): Promise<WrittenManifest> {
    const { checkpoint } = writing.manifest
    return this.#files.write({ ...writing, address: this.#addressOf({ branch, checkpoint }) }, released)
  }

  readManifest(key: CheckpointKey): Promise<Manifest> {
    return readManifest(this.#folderOf(key), basename(this.path))
  }

  readTensors(key: CheckpointKey, of: Parameters<RunMedium['readTensors']>[1]): Promise<void> {
    return this.#files.read({ ...of, address: this.#addressOf(key) })
  }

  async writeTags(key: CheckpointKey, tags: readonly string[]): Promise<CheckpointEntry> {
    const manifest = { ...(await this.readManifest(key)), tags }
    await replaceFile(join(this.#folderOf(key), MANIFEST), sealManifest(manifest))
    return entryOf(manifest, key.branch)
  }

  /** Without its manifest a checkpoint does not count, whatever a crash leaves of it. */
  async forgetCheckpoint(key: CheckpointKey): Promise<void> {
    const folder = this.#folderOf(key)
    await unlink(join(folder, MANIFEST))
    await syncFolder(folder)
  }

  clearCheckpoint(key: CheckpointKey): Promise<void> {
    return rm(this.#folderOf(key), { recursive: true })
  }

  async makeBranch(branch: number): Promise<void> {
    const folder = branchFolder(this.path, branch)
    for (const name of ['checkpoints', 'journal']) await makeFolder(join(folder, name))
    for (const parent of [folder, dirname(folder), this.path]) await syncFolder(parent)
  }

  async clearBranches(present: number, left: ReadonlySet<number>): Promise<void> {
    for (const branch of await branchesOnDisk(this.path)) {
      if (branch === present) continue
      if (branch === 0 || left.has(branch)) await this.clearJournal(branch)
      else await rm(branchFolder(this.path, branch), { recursive: true })
    }
  }

  openJournal(branch: number, options: Parameters<RunMedium['openJournal']>[1]): Promise<Journal> {
    return FileJournal.open(this.journalOf(branch), options)
  }

  readJournal(branch: number, step: number): ReturnType<typeof readJournal> {
    return readJournal(this.journalOf(branch), step)
  }

  async mayHaveSteps(branch: number, after: number): Promise<boolean> {
    return segmentsAfter(await listSegments(this.journalOf(branch)), after).some(({ bytes }) => bytes > 0)
  }

  clearJournal(branch: number): Promise<void> {
    return clearJournal(this.journalOf(branch))
  }

  /** The folder of a branch's journal. */
  journalOf(branch: number): string {
    return join(branchFolder(this.path, branch), 'journal')
  }

  #addressOf(key: CheckpointKey): CheckpointAddress {
    return { kind: 'folder', folder: this.#folderOf(key) }
  }

  #folderOf({ branch, checkpoint }: CheckpointKey): string {
    return join(branchFolder(this.path, branch), 'checkpoints', checkpoint)
  }
}

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
