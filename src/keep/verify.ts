import { existsSync } from 'node:fs'
import { basename, join } from 'node:path'
import type { Declaration } from '../run/declaration.js'
import { branchFolder } from '../store/branches.js'
import type { CheckpointFiles } from '../store/checkpoint/checkpoint-files.js'
import { CheckpointList, readCheckpoints, readManifest } from '../store/checkpoint/checkpoint-list.js'
import { openCheckpoint } from '../store/checkpoint/checkpoint-source.js'
import { type Manifest, UnreadableError } from '../store/checkpoint/manifest.js'
import { stateName } from '../store/checkpoint/state-source.js'
import { readIdentity, refuseLink } from '../store/folder/run-folder.js'
import { listSegments } from '../store/journal/journal.js'
import { readJournal } from '../store/journal/journal-reader.js'
import { SAFETENSORS_NAMES } from '../store/safetensors.js'
import { checkDigest, keptDeclaration } from './restore.js'

/** A run on the disk. */
export type StoredRun = {
  /** The step that it goes on from, with those of the journal; 0 and '' where its making was interrupted. */
  readonly step: number
  /** The checkpoint that it goes on from, and how many there are of all branches. */
  readonly checkpoint: string
  readonly checkpoints: number
  /** Bytes of that checkpoint's files. */
  readonly bytes: number
  /** Steps behind the checkpoint, in the journal. */
  readonly journalSteps: number
}

/**
 * Reads what a start would bring a run back from, and holds it against every hash there is: the checkpoint, its
 * tensors, its digest, and the records of the journal, whose steps are not computed again. Changes nothing, so a
 * service may be at work in the folder; what that removes meanwhile is missing here. Throws UnreadableError,
 * ServiceError for what no `open` could have declared, and the file system's errors.
 */
export async function verifyRun(folder: string, files: CheckpointFiles): Promise<StoredRun> {
  await refuseLink(folder)
  const entries = await readCheckpoints(folder, { tidy: false })
  const identity = await readIdentity(folder, entries.length === 0)
  const journal = join(branchFolder(folder, identity.branch), 'journal')
  const { newest } = new CheckpointList(entries, identity)
  if (newest?.problem !== undefined) throw new UnreadableError(newest.problem)
  if (newest === undefined) return unfinished(folder, journal)
  const place = join(branchFolder(folder, newest.branch), 'checkpoints', newest.checkpoint)
  const manifest = await readManifest(place, basename(folder))
  const declaration = keptDeclaration(manifest)
  checkDigest(manifest, declaration)
  await files.read({
    address: { kind: 'folder', folder: place },
    files: manifest.files,
    targets: new Map(),
    locations: [],
  })
  await checkTensors(place, manifest, declaration)
  const { steps } = existsSync(journal) ? await readJournal(journal, manifest.step) : { steps: [] }
  return {
    step: manifest.step + steps.length,
    checkpoint: newest.checkpoint,
    checkpoints: entries.length,
    bytes: manifest.bytes,
    journalSteps: steps.length,
  }
}

/** Throws UnreadableError where a checkpoint lacks a tensor of its run, or has it in another dtype or shape. */
async function checkTensors(folder: string, { places }: Manifest, { parameters }: Declaration): Promise<void> {
  const source = await openCheckpoint(folder)
  await source.close()
  const stored = new Map(source.tensors.map(({ name, dtype, shape }) => [name, `${dtype} [${shape}]`]))
  for (const [i, { name, state }] of parameters.entries()) {
    if (places[i].count === 0) continue
    for (const { name: kind, dtype, shape } of state) {
      const [tensor, expected] = [stateName(name, kind), `${SAFETENSORS_NAMES[dtype]} [${shape}]`]
      const has = stored.get(tensor)
      if (has === undefined) throw new UnreadableError(`${folder} has no tensor '${tensor}'`)
      if (has !== expected) throw new UnreadableError(`${folder}: tensor '${tensor}' is ${has}, expected ${expected}`)
    }
  }
}

/** A run without a checkpoint: its making was interrupted, unless there are steps. */
async function unfinished(folder: string, journal: string): Promise<StoredRun> {
  const segments = existsSync(journal) ? await listSegments(journal) : []
  if (segments.some(({ bytes }) => bytes > 0))
    throw new UnreadableError(`${folder} has a journal and no checkpoint that it goes on from`)
  return { step: 0, checkpoint: '', checkpoints: 0, bytes: 0, journalSteps: 0 }
}
