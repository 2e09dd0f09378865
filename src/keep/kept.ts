import type { Device } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import { ServiceError } from '../errors.js'
import type { Groups } from '../optimizer/hyperparameters.js'
import type { Declaration } from '../run/declaration.js'
import { importNote } from '../run/imported-state.js'
import { groupRecords } from '../run/record.js'
import type { Run } from '../run/run.js'
import type { CheckpointEntry } from '../store/checkpoint/checkpoint-list.js'
import { type Manifest, UnreadableError } from '../store/checkpoint/manifest.js'
import { cutTail } from '../store/journal/journal-reader.js'
import type { RunStore } from '../store/run-store.js'
import type { Source } from '../wire/frame.js'
import { unreadable } from './absent.js'
import type { Log } from './keeper.js'
import { type CheckpointOnDisk, checkDigest, differenceOf, keptDeclaration, readTensors, replay } from './restore.js'

/** A checkpoint that was read: its tensors are nobody's until a run has taken them. */
export type Kept = { readonly manifest: Manifest; readonly tensors: (Tensor[] | undefined)[]; taken: boolean }

/** Reads a checkpoint for a run of the same parameters: whatever it gives was held against every hash there is. */
export async function readKept(device: Device, run: Run, of: CheckpointOnDisk): Promise<Kept> {
  const { parameters, grant } = run
  checkDigest(of.manifest, run)
  const tensors = await readTensors(device, of, { parameters, units: grant.units })
  return { manifest: of.manifest, tensors, taken: false }
}

/**
 * Puts a run where a checkpoint is that was read for it; `origin` tells its client where it has come from. `elsewhere`:
 * another kind of device had computed it.
 */
export function takeKept(device: Device, run: Run, kept: Kept, origin?: string): { elsewhere: boolean } {
  const { manifest, tensors } = kept
  kept.taken = true
  const difference = differenceOf(manifest.device, device.record)
  const elsewhere = difference !== undefined
  const imported = manifest.imported && importNote(manifest.step)
  const restored = elsewhere ? `restored from ${manifest.checkpoint}: ${difference}` : undefined
  const note = [origin, imported, restored].filter((part) => part !== undefined).join('; ')
  run.restore(manifest, { tensors, elsewhere, note })
  return { elsewhere }
}

/** Gives back what no run has taken. */
export function releaseKept(device: Device, { tensors, taken }: Kept): void {
  if (taken) return
  for (const tensor of tensors.flat()) if (tensor) device.memory.release(tensor)
}

/** Computes the steps behind a checkpoint again; returns how many there are. */
export async function replayJournal(
  { log }: { log: Log },
  run: Run,
  { store, manifest, elsewhere }: { store: RunStore; manifest: Manifest; elsewhere: boolean },
): Promise<number> {
  const { steps, tail } = await store.readJournal(manifest.step)
  if (tail) {
    const { path, at, bytes, damaged } = tail
    const event = { event: 'journal_cut', run: run.name, path, at, bytes }
    if (damaged) log.warn({ ...event, reason: damaged })
    else log.info({ ...event, reason: 'the step was not finished' })
    await cutTail(tail)
  }
  await replay(run, { steps, elsewhere })
  return steps.length
}

type CopyMeans = { device: Device; build(name: string, declaration: Declaration): Promise<Run> }

/**
 * A checkpoint of another run, and what holds an `open` against it: that answers the groups that the `open` gives, if
 * any.
 */
type Original = { store: RunStore; from: Source; agree: (run: Run) => Promise<Groups | undefined> }

/** A run of its own that is where a checkpoint of another one is, in memory only. */
export async function copyOf(
  { device, build }: CopyMeans,
  name: string,
  { store, from, agree }: Original,
): Promise<Run> {
  const { declaration, ...of } = await ofRun(from.run, locate(store, from))
  const run = await build(name, declaration)
  try {
    const groups = await agree(run)
    const kept = await ofRun(from.run, readKept(device, run, of))
    const manifest = { ...kept.manifest, ...(groups && { groups: groupRecords(groups) }) }
    takeKept(device, run, { ...kept, manifest }, `branched from ${of.entry.checkpoint} of run '${from.run}'`)
    return run
  } catch (error) {
    run.dispose()
    throw error
  }
}

async function locate(store: RunStore, { run, checkpoint }: Source) {
  const entry = findCheckpoint(store, run, checkpoint)
  const manifest = await store.manifest(entry)
  return { store, entry, manifest, declaration: keptDeclaration(manifest) }
}

/** The end of work that reads what is kept of a run: its errors name the run. */
export async function ofRun<T>(name: string, work: Promise<T>): Promise<T> {
  return work.catch((error) => {
    throw unreadable(name, error)
  })
}

/** A checkpoint by its id or a tag. Throws UnreadableError, and NOT_FOUND with those that there are. */
export function findCheckpoint(store: RunStore, run: string, checkpoint: string): CheckpointEntry {
  const entry = store.find(checkpoint)
  if (entry?.problem) throw new UnreadableError(entry.problem)
  if (entry) return entry
  const known = store.checkpoints.map((other) => other.checkpoint)
  throw new ServiceError(
    'NOT_FOUND',
    `run '${run}' has no checkpoint '${checkpoint}'; its ${known.length}: ${known.join(', ')}`,
  )
}
