import type { AttentionDeclaration, GroupDeclaration, ParameterDeclaration } from '../../wire/frame.js'
import type { AssignedShard } from '../assignment.js'
import type { CommitLog } from '../commit-log.js'

/** A checkpoint of a whole: those of its shards, in their order, after one step. No two have the same `checkpoint`. */
export type WholeCheckpoint = {
  readonly checkpoint: string
  readonly tag?: string
  readonly step: number
  readonly digest: string
  readonly shards: readonly string[]
}

/** What a whole was created with. */
export type WholeRecord = {
  readonly run: string
  readonly created_at: string
  readonly groups: readonly GroupDeclaration[]
  readonly parameters: readonly ParameterDeclaration[]
  readonly attentions: readonly AttentionDeclaration[]
  readonly shards: readonly AssignedShard[]
}

/** The log of a whole that is kept. */
export interface StoredLog extends CommitLog {
  /** Resolves once every `put` has ended. */
  close(): Promise<void>
}

/** What is kept of a whole. */
export type StoredWhole = {
  readonly record: WholeRecord
  readonly checkpoints: readonly WholeCheckpoint[]
  readonly log: StoredLog
}

/** Where the wholes of a cluster are kept. Every call throws STORAGE_FAILED where the store cannot be used. */
export interface WholeStore {
  /** Whether every process of the cluster sees the same. */
  readonly isShared: boolean
  /** Of all that are there, in order. */
  names(): Promise<string[]>
  /** Throws RUN_EXISTS where there is one of this name. */
  create(record: WholeRecord): Promise<StoredWhole>
  /** Throws RUN_NOT_FOUND, and CHECKPOINT_UNREADABLE for what is not what was written. */
  read(run: string): Promise<StoredWhole>
  has(run: string): Promise<boolean>
  /**
   * Keeps these checkpoints in the place of those that this process has read or kept before. Answers what is there
   * then: where the store is shared, checkpoints of another head are among them. Throws RUN_NOT_FOUND.
   */
  keepCheckpoints(run: string, checkpoints: readonly WholeCheckpoint[]): Promise<readonly WholeCheckpoint[]>
  /** Throws RUN_NOT_FOUND. The name is free once this resolves. */
  remove(run: string): Promise<void>
}
