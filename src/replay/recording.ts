import { type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import { keptDeclaration } from '../keep/restore.js'
import type { Declaration } from '../run/declaration.js'
import type { CheckpointFiles } from '../store/checkpoint/checkpoint-files.js'
import type { CheckpointEntry } from '../store/checkpoint/checkpoint-list.js'
import { refuseObjects } from '../store/checkpoint/checkpoint-source.js'
import { type Manifest, UnreadableError } from '../store/checkpoint/manifest.js'
import { RunFolder } from '../store/folder/run-folder.js'
import { listSegments, type Segment } from '../store/journal/journal.js'
import { readSteps, type StoredStep, segmentsAfter } from '../store/journal/journal-reader.js'
import { RunStore } from '../store/run-store.js'
import { OPEN_NAME } from '../wire/frame.js'
import { type Scanned, scan } from './scan.js'

/** What is to be computed again: a run of a data folder, from a checkpoint (by its id or a tag) to a step. */
export type Wanted = { data: string; run: string; from?: string; to?: number }

/**
 * A run on the disk: the checkpoint that its steps are computed again from, and those steps. The folder is read and
 * never written to; files of the journal stay open, so that a service at work there may remove them meanwhile.
 */
export type Recording = {
  readonly run: string
  readonly store: RunStore
  readonly entry: CheckpointEntry
  readonly manifest: Manifest
  readonly declaration: Declaration
  /** The steps behind the checkpoint, the oldest first, without their gradients. */
  readonly scanned: readonly Scanned[]
  /** The last step that is computed again, and the last one that the journal has. */
  readonly to: number
  readonly last: number
  /** The open files of the journal, by their paths. */
  readonly files: ReadonlyMap<string, FileHandle>
  /** Reads the steps one at a time. */
  steps(): AsyncGenerator<StoredStep>
}

/** Opens a run's folder for `work`. Throws UnreadableError where steps are not there, with what is there instead. */
export async function withRecording<T>(
  wanted: Wanted,
  files: CheckpointFiles,
  work: (recording: Recording) => Promise<T>,
): Promise<T> {
  const { data, run } = wanted
  refuseObjects(data)
  const path = join(data, 'runs', run)
  if (!OPEN_NAME.test(run)) throw new UnreadableError(`'${run}' is no name of a run`)
  const folder = new RunFolder(path, files)
  const store = await RunStore.open(folder, { tidy: false }).catch((error) => {
    throw error instanceof UnreadableError
      ? error
      : new UnreadableError(`data folder '${data}' has no run '${run}': ${error.message}`)
  })
  const segments = await listSegments(folder.journalOf(store.identity.branch))
  const opened = new Map<string, FileHandle>()
  try {
    for (const segment of segments) {
      segment.file = await openFile(segment)
      opened.set(segment.path, segment.file)
    }
    return await work(await record(store, wanted, { segments, files: opened }))
  } finally {
    for (const file of opened.values()) await file.close()
  }
}

async function openFile({ path }: Segment): Promise<FileHandle> {
  return open(path, 'r').catch((error) => {
    /* c8 ignore next 2 -- the service removes the file between two calls of this process */
    const remedy = 'a service that is at work there has just removed it: try again'
    throw new UnreadableError(`${path} cannot be opened: ${error.message}; ${remedy}`)
  })
}

type Journal = { segments: readonly Segment[]; files: ReadonlyMap<string, FileHandle> }

async function record(store: RunStore, wanted: Wanted, { segments, files }: Journal): Promise<Recording> {
  const { run } = wanted
  const scanned = await scan(segments)
  const begin = scanned[0]?.step ?? 0
  const last = scanned.at(-1)?.step ?? 0
  const to = wanted.to ?? last
  const origins = await originsOf(store, { begin, to })
  const entry = chosen(store, { ...wanted, to }, { begin, last, origins })
  const manifest = await store.manifest(entry)
  if (entry.step >= to) throw new UnreadableError(`step ${to} is to be the last one, ${nameOf(entry)} is behind it`)
  return {
    ...{ run, store, entry, manifest, to, last, files, declaration: keptDeclaration(manifest) },
    scanned: scanned.filter(({ step }) => step > entry.step && step <= to),
    steps: () => stepsOf(segmentsAfter(segments, entry.step), { after: entry.step, to }),
  }
}

async function* stepsOf(
  segments: readonly Segment[],
  { after, to }: { after: number; to: number },
): AsyncGenerator<StoredStep> {
  for await (const stored of readSteps(segments, after)) {
    if (stored.step > to) return
    yield stored
  }
}

/** A checkpoint of the run's present history; `problem` says why its steps cannot be computed again, if they cannot. */
type Origin = { entry: CheckpointEntry; problem?: string }

/** Looks at every checkpoint of the history that the run has now, the oldest first. */
async function originsOf(store: RunStore, { begin, to }: { begin: number; to: number }): Promise<Origin[]> {
  const origins: Origin[] = []
  let imported: CheckpointEntry | undefined
  for (const entry of store.history.toReversed()) {
    const { step, problem } = entry
    origins.unshift({ entry, problem: problem ?? gapOf(entry, begin, imported) })
    if (problem === undefined && step < to && (await store.manifest(entry)).imported) imported = entry
  }
  return origins
}

function gapOf(entry: CheckpointEntry, begin: number, imported: CheckpointEntry | undefined): string | undefined {
  const name = nameOf(entry)
  if (entry.step + 1 < begin)
    return `${name} is of step ${entry.step}, and the journal begins with step ${begin}: what is between is not kept`
  if (imported)
    return `${name} comes before an import of state, ${imported.checkpoint}: replay from there, or --to ${imported.step} at most`
  return undefined
}

type Found = { begin: number; last: number; origins: readonly Origin[] }

function chosen(
  store: RunStore,
  { run, from, to }: Wanted & { to: number },
  { begin, last, origins }: Found,
): CheckpointEntry {
  if (last === 0)
    throw new UnreadableError(
      `run '${run}' has no steps in its journal: a checkpoint ends the journal before it, unless the service was started with --durability journal --keep-journal`,
    )
  if (to > last) throw new UnreadableError(`--to is ${to}, the last step in the journal of run '${run}' is ${last}`)
  if (from === undefined) {
    const oldest = origins.find(({ entry, problem }) => problem === undefined && entry.step < to)
    if (oldest) return oldest.entry
    const problems = origins.map(({ entry, problem }) => problem ?? `${nameOf(entry)} is behind step ${to - 1}`)
    throw new UnreadableError(
      `run '${run}' has steps ${begin} to ${last} in its journal and no checkpoint that they can be computed from: ${problems.join('; ') || 'there is none'}`,
    )
  }
  const entry = store.find(from)
  if (!entry) throw new UnreadableError(`run '${run}' has no checkpoint '${from}', there are ${listOf(store)}`)
  const origin = origins.find((one) => one.entry.checkpoint === entry.checkpoint)
  if (!origin)
    throw new UnreadableError(
      `${nameOf(entry)} is of branch ${entry.branch} of the history, which the run has left with its journal`,
    )
  if (origin.problem !== undefined) throw new UnreadableError(origin.problem)
  return origin.entry
}

function nameOf({ checkpoint }: CheckpointEntry): string {
  return `checkpoint '${checkpoint}'`
}

function listOf({ checkpoints }: RunStore): string {
  return checkpoints.map(({ checkpoint }) => checkpoint).join(', ')
}
