import { readdir, readFile, rm } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { errorText } from '../../errors.js'
import { type Branching, branchFolder, HistoryPath } from '../branches.js'
import { namesIn } from '../durable.js'
import { byAge, checkpointId, isCheckpointId, numbersOf } from './checkpoint-id.js'
import { MANIFEST } from './checkpoint-place.js'
import { type Manifest, openManifest, UnreadableError } from './manifest.js'

/** A checkpoint on the disk. `problem` says why it cannot be read. */
export type CheckpointEntry = {
  checkpoint: string
  /** The branch of the run's history that it was taken on. */
  branch: number
  tags: readonly string[]
  step: number
  digest: string
  bytes: number
  written_at: string
  problem?: string
}

/** The checkpoints of a run: those of the history that it has now, and those of branches that it has left. */
export class CheckpointList {
  /** The oldest step first, of all branches. */
  readonly entries: readonly CheckpointEntry[]
  /** Those of the history that the run has now, the oldest first. */
  readonly history: readonly CheckpointEntry[]

  constructor(entries: readonly CheckpointEntry[], branching: Branching) {
    const path = new HistoryPath(branching)
    this.entries = entries.toSorted((one, other) => byAge(one.checkpoint, other.checkpoint))
    this.history = this.entries.filter((entry) => path.has(entry))
  }

  /** The one that the run goes on from after a restart. */
  get newest(): CheckpointEntry | undefined {
    return this.history.at(-1)
  }

  /** One by its id, or the newest one with a tag: of the run's present history where that has one. */
  find(name: string): CheckpointEntry | undefined {
    const isTagged = ({ tags }: CheckpointEntry) => tags.includes(name)
    return (
      this.entries.find(({ checkpoint }) => checkpoint === name) ??
      this.history.findLast(isTagged) ??
      this.entries
        .filter(isTagged)
        .toSorted((one, other) => one.branch - other.branch)
        .at(-1)
    )
  }

  /** Those of the present history that neither are among its `kept` newest ones without a tag nor have one. */
  superfluous(kept: number): CheckpointEntry[] {
    const untagged = this.history.filter((entry) => !isLedTo(entry, this.history))
    return untagged.slice(0, Math.max(0, untagged.length - kept))
  }

  /**
   * Those of branches that were left to which no tag leads, the newest first. One that cannot be read stays: it may
   * have a tag.
   */
  abandoned(): CheckpointEntry[] {
    const left = this.entries.filter((entry) => !this.history.includes(entry))
    return left.filter((entry) => entry.problem === undefined && !isLedTo(entry, sameBranch(entry, left))).reverse()
  }

  /** An id that no checkpoint has. One is never written over another one: a crash in between would leave neither. */
  freshId(step: number, imported: boolean): string {
    const numbers = this.entries
      .filter((entry) => entry.step === step)
      .map(({ checkpoint }) => numbersOf(checkpoint)[1])
    return numbers.length === 0 && !imported ? checkpointId(step) : checkpointId(step, Math.max(0, ...numbers) + 1)
  }
}

function sameBranch({ branch }: CheckpointEntry, entries: readonly CheckpointEntry[]): CheckpointEntry[] {
  return entries.filter((other) => other.branch === branch)
}

/** Whether one of a checkpoint's tags leads to it among `entries`, which are in their order. */
function isLedTo(entry: CheckpointEntry, entries: readonly CheckpointEntry[]): boolean {
  return entry.tags.some((tag) => entries.findLast(({ tags }) => tags.includes(tag)) === entry)
}

/** The numbers of the branches that have a folder, in their order. Branch 0 has that of the run. */
export async function branchesOnDisk(run: string): Promise<number[]> {
  const names = await namesIn(join(run, 'branches'))
  const numbers = names.filter((name) => /^[1-9]\d{0,14}$/.test(name)).map(Number)
  return [0, ...numbers.sort((one, other) => one - other)]
}

/**
 * Reads what checkpoints a run's folder has, in all its branches. One without a manifest is unfinished and does not
 * count: with `tidy` it is removed.
 */
export async function readCheckpoints(run: string, { tidy }: { tidy: boolean }): Promise<CheckpointEntry[]> {
  const entries: CheckpointEntry[] = []
  for (const branch of await branchesOnDisk(run)) {
    const folder = join(branchFolder(run, branch), 'checkpoints')
    for (const checkpoint of (await namesIn(folder)).filter(isCheckpointId)) {
      const path = join(folder, checkpoint)
      if ((await readdir(path)).includes(MANIFEST)) entries.push(await readEntry(path, { run: basename(run), branch }))
      else if (tidy) await rm(path, { recursive: true })
    }
  }
  return entries
}

/**
 * Reads the manifest in a checkpoint's folder. Throws the file system's error, and UnreadableError where the file is
 * not what was written there. With a `run` the folder must be the run's own: none that was copied or renamed.
 */
export async function readManifest(folder: string, run?: string): Promise<Manifest> {
  const path = join(folder, MANIFEST)
  const manifest = openManifest(await readFile(path, 'utf8'), path)
  return run === undefined ? manifest : ownManifest(manifest, path, { run, checkpoint: basename(folder) })
}

/** The manifest, which must be that of the run and the checkpoint that its folder is called after. */
export function ownManifest(
  manifest: Manifest,
  path: string,
  expected: Pick<Manifest, 'run' | 'checkpoint'>,
): Manifest {
  const wrong = (['run', 'checkpoint'] as const).find((key) => manifest[key] !== expected[key])
  if (wrong === undefined) return manifest
  throw new UnreadableError(
    `${path}: ${wrong} is "${manifest[wrong]}", expected '${expected[wrong]}' as its folder is called`,
  )
}

export function entryOf(
  { checkpoint, tags, bytes, written_at, step, digest }: Omit<CheckpointEntry, 'branch' | 'problem'>,
  branch: number,
): CheckpointEntry {
  return { checkpoint, branch, tags, step, digest, bytes, written_at }
}

async function readEntry(folder: string, { run, branch }: { run: string; branch: number }): Promise<CheckpointEntry> {
  try {
    return entryOf(await readManifest(folder, run), branch)
  } catch (error) {
    const checkpoint = basename(folder)
    const [step] = numbersOf(checkpoint)
    const what = error instanceof UnreadableError ? '' : `${join(folder, MANIFEST)} cannot be read: `
    const problem = what + errorText(error)
    return { checkpoint, branch, tags: [], step, digest: '', bytes: 0, written_at: '', problem }
  }
}
