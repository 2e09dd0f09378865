import type { StateLocation } from '../device/state-access.js'
import type { Writing } from './checkpoint/checkpoint-files.js'
import type { CheckpointEntry } from './checkpoint/checkpoint-list.js'
import type { WrittenManifest } from './checkpoint/checkpoint-thread.js'
import type { Manifest } from './checkpoint/manifest.js'
import type { TensorLocation } from './checkpoint/state-files.js'
import type { Identity } from './identity.js'
import type { Journal, JournalOptions } from './journal/journal.js'
import type { StoredStep, Tail } from './journal/journal-reader.js'

/** Which checkpoint of a run. */
export type CheckpointKey = Pick<CheckpointEntry, 'branch' | 'checkpoint'>

/** Where tensors are read into, by their names in a checkpoint. */
export type Targets = ReadonlyMap<string, TensorLocation & { dtype: string; shape: readonly number[] }>

/** What is kept of a run. */
export type RunRecords = { identity: Identity; entries: CheckpointEntry[] }

/**
 * Where what is kept of one run lies: a folder, or the objects of a bucket. Whatever a call has changed is so after a
 * crash too once it resolves; a crash before leaves it as it was. Only one process at a time may change something.
 */
export type RunMedium = {
  /** For messages and logs. */
  readonly path: string
  /** Makes a place for a run that has none, with its identity. */
  create(identity: Identity): Promise<void>
  /**
   * Reads what is there, and with `tidy` removes what a crash has left unfinished. Throws UnreadableError where that is
   * not what was written.
   */
  read(how: { tidy: boolean }): Promise<RunRecords>
  writeIdentity(identity: Identity): Promise<void>
  /** Writes a checkpoint, which counts once this resolves; `released` as for `CheckpointFiles.write`. */
  writeCheckpoint(
    branch: number,
    writing: Omit<Writing, 'address'>,
    released: (entries: number) => void,
  ): Promise<WrittenManifest>
  /** Throws UnreadableError, also where the manifest is of another run or checkpoint. */
  readManifest(key: CheckpointKey): Promise<Manifest>
  /** Reads tensors into `targets` and holds every file against its hash. Throws UnreadableError. */
  readTensors(
    key: CheckpointKey,
    of: Pick<Manifest, 'files'> & { targets: Targets; locations: readonly StateLocation[] },
  ): Promise<void>
  /** Gives a checkpoint other tags; answers its entry. */
  writeTags(key: CheckpointKey, tags: readonly string[]): Promise<CheckpointEntry>
  /** Has a checkpoint count no more. */
  forgetCheckpoint(key: CheckpointKey): Promise<void>
  /** Removes the files of a checkpoint that counts no more. */
  clearCheckpoint(key: CheckpointKey): Promise<void>
  /** Makes a place for the checkpoints and the journal of a branch. */
  makeBranch(branch: number): Promise<void>
  /** Removes journals of all branches but the `present` one, and branches that are not among the `left` ones at all. */
  clearBranches(present: number, left: ReadonlySet<number>): Promise<void>
  openJournal(branch: number, options: JournalOptions & { first: number }): Promise<Journal>
  /** The finished steps of a branch's journal after `step`. Throws UnreadableError. */
  readJournal(branch: number, step: number): Promise<{ steps: StoredStep[]; tail?: Tail }>
  /** Whether a branch's journal may have steps after this one. */
  mayHaveSteps(branch: number, after: number): Promise<boolean>
  clearJournal(branch: number): Promise<void>
}
