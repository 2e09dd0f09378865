import type { EventEmitter } from 'node:events'
import type { Assignment } from '../assignment.js'

/** Another process of the cluster, or this one, as it was last seen. */
export type Peer = {
  /** Its origin, such as http://muond-0.muond:8787: its name in the cluster, too. */
  readonly url: string
  /** Bytes of state that it has room for. */
  readonly free_bytes: number
  readonly device: string
  /**
   * When this process last saw it alive, in seconds since 1970 by the clock of this process. People read it; nothing is
   * decided by it.
   */
  readonly renewed_at: number
}

/** What a process tells the others of itself. */
export type PeerReport = Pick<Peer, 'free_bytes' | 'device'>

/** A value and the version of it that a write names. Versions are compared for equality alone. */
export type Versioned<T> = { readonly value: T; readonly version: string }

/**
 * `peers`: processes have come or gone. `problem`: what `problem()` says has changed. `look`: this process has looked
 * for the others, with or without an answer, three times in the length of a lease.
 */
export type CoordinatorEvents = { peers: []; problem: []; look: [] }

/**
 * Who is alive, and who has which run. Nothing of the service uses it yet: its peers are those of the setting `peers`,
 * and its assignments are with their heads (`src/cluster/peers`, `src/cluster/head`).
 *
 * Who is alive is a guess. A lease that has ended does not stop the process that had it: it may have been paused, or be
 * cut off from the coordinator alone, and go on. So `peers()` and `headOf` decide who is asked first, and nothing that
 * must not happen twice depends on them. The fences are two conditional writes: `writeAssignment`, of which one of many
 * writers with the same version succeeds, and the commit log, which takes one commit for a step. A process whose lease
 * has ended loses them by the generation that its votes and commits carry. Clocks are compared nowhere: a lease is
 * judged by the system that keeps it, or by how long this process has seen no renewal on its own monotonic clock.
 */
export interface Coordinator {
  readonly changes: EventEmitter<CoordinatorEvents>
  /** Announces this process and looks for the others. Throws ConfigError where that cannot be done. */
  start(): Promise<void>
  /** Leaves: the others are told at once, without waiting for the end of a lease. */
  stop(): Promise<void>
  /**
   * The processes that are alive, this one among them, by url. While the coordinator cannot be reached these are those
   * of the last look: its loss alone makes nobody dead.
   */
  peers(): readonly Peer[]
  /**
   * For readyz: that the coordinator cannot be reached, or another process has taken this one's name; undefined while
   * all is well.
   */
  problem(): string | undefined
  readAssignment(run: string): Promise<Versioned<Assignment> | undefined>
  /**
   * Writes the assignment of a run if its version is still the given one; undefined: if there is none. Answers whether
   * it did. Throws COORDINATOR_FAILED where that is not known: the assignment may stand, and must be read again.
   */
  writeAssignment(run: string, assignment: Assignment, version: string | undefined): Promise<boolean>
  /**
   * Removes it, of a run that is deleted, if its version is still the given one. Generations of a run of the same name
   * begin anew.
   */
  removeAssignment(run: string, version: string): Promise<boolean>
  /**
   * The url of the process that commits the steps of a run. With static peers it is a function of the name and of the
   * list of peers, alive or not. With a coordinator the first one that asks appoints a process that is alive, and while
   * that is, all get the same answer; while the coordinator cannot be reached, the last one.
   */
  headOf(run: string): Promise<string>
}
