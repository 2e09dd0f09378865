import type { CheckpointEntry } from '../checkpoint/checkpoint-list.js'
import { held, seal, UnreadableError, unseal } from '../checkpoint/manifest.js'
import { checkpointIdRule, tagRule } from '../checkpoint/manifest-rules.js'
import { type Identity, identityRule } from '../identity.js'
import { count, list, natural, oneOf, optional, type Rule, record, sha256, text } from '../rules.js'

/** A checkpoint that counts, and where its objects are below the run's own key. */
export type IndexedCheckpoint = Omit<CheckpointEntry, 'problem'> & { folder: string }

/**
 * The object `run.json` of a run: all that counts of it. Every change of a run is one conditional write of this object,
 * so that one service alone can make it; everything else that the run has are objects that this one names, or garbage.
 */
export type RunIndex = {
  format: number
  /** Of the service that has the run. Objects of this generation and of higher ones are not garbage. */
  generation: number
  /** One more with every write, so that no two have the same bytes. */
  writes: number
  /** The run was deleted: its name is free, and nothing else here counts. */
  deleted?: true | undefined
  identity: Identity
  checkpoints: IndexedCheckpoint[]
  /** The folder of the journal of all branches. */
  journal: string
}

/** The folder of a checkpoint: its id, the generation of the service that wrote it, and a number of that service. */
const FOLDER = /^checkpoints\/step-\d{12}(?:\.\d+)?@(\d{1,15})\.\d{1,15}$/
/** The folder of a journal: the generation of the service that began it, and a number of that service. */
const JOURNAL = /^journal\/(\d{1,15})\.\d{1,15}$/

const rule: Rule<RunIndex> = record<RunIndex>({
  format: count,
  generation: natural,
  writes: count,
  deleted: optional(oneOf(true)),
  identity: identityRule,
  checkpoints: list(
    record<IndexedCheckpoint>({
      checkpoint: checkpointIdRule,
      branch: count,
      folder: text('the folder of a checkpoint', FOLDER),
      tags: list(tagRule),
      step: count,
      digest: sha256,
      bytes: count,
      written_at: text(),
    }),
  ),
  journal: text('the folder of a journal', JOURNAL),
})

export function sealIndex(index: RunIndex): Buffer {
  return Buffer.from(seal(index))
}

/** Reads the index of a run. Throws UnreadableError, also where it is of another run. */
export function openIndex(bytes: Buffer, file: string, run: string): RunIndex {
  const index = held(rule, unseal(bytes.toString(), file), file)
  if (index.identity.run === run) return index
  throw new UnreadableError(`${file}: run is "${index.identity.run}", expected '${run}' as its key has it`)
}

/** The folder of a new checkpoint, of which no other service and no other attempt has one. */
export function checkpointFolderOf(checkpoint: string, { generation, number }: { generation: number; number: number }) {
  return `checkpoints/${checkpoint}@${generation}.${number}`
}

/** The folder of a new journal. */
export function journalFolderOf({ generation, number }: { generation: number; number: number }) {
  return `journal/${generation}.${number}`
}

/** The folder that a key below that of a run is in, and who made that; undefined where it is in none. */
export function folderIn(key: string): { folder: string; generation: number } | undefined {
  const folder = key.split('/').slice(0, 2).join('/')
  const [, generation] = FOLDER.exec(folder) ?? JOURNAL.exec(folder) ?? []
  return generation === undefined ? undefined : { folder, generation: Number(generation) }
}
