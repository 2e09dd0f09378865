import type { RunStore } from './run-store.js'

/** Where all runs of a service are kept, which no other service writes to meanwhile. */
export type DataStore = {
  /** The names of the runs that were there when it was opened. */
  readonly names: readonly string[]
  /** Resolves, with the reason, when another service has taken the store: this one can write nothing any more. */
  readonly lost: Promise<string>
  /** Why nothing can be written, a sentence; undefined where something can. */
  problem(): Promise<string | undefined>
  create(run: string): Promise<RunStore>
  /** Throws UnreadableError. */
  find(run: string): Promise<RunStore>
  /**
   * Copies a run from the place of another process, which is known by its URL, into this one, where there must be none
   * of its name: its checkpoints, its journal and its history. The other may go on writing there; nothing of that is
   * changed. Answers whether it has such a run. Throws StoreError and UnreadableError, and leaves nothing then.
   * Undefined where this process sees no other one's place.
   */
  adopt?(run: string, from: string): Promise<boolean>
  /** Removes a run, whatever is left of it. */
  destroy(run: string): Promise<void>
  /** Lets another service in, once every checkpoint that was asked for is written. */
  close(): Promise<void>
}
