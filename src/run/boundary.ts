import assert from 'node:assert'
import { type EventEmitter, once } from 'node:events'
import { ServiceError } from '../errors.js'
import type { RunEvents } from './history.js'

/** How many requests may wait for the step in progress to end, and how long. */
export const MOST_WAITING = 8
const MOST_MS = 30_000

/** A run, as far as its boundary has to know it. */
type Stepping = EventEmitter<RunEvents> & {
  readonly name: string
  /** Whether a step has begun and has not ended. */
  readonly begun: boolean
  /** When every job has been committed or dropped. */
  settled(): Promise<void>
  /** Throws STEP_INCOMPLETE where a step has begun. */
  checkBetween(what: string): void
}

/** The time between two steps of a run: work that needs it waits for it, and holds the next step while it lasts. */
export class Boundary {
  readonly #run: Stepping
  #waiting = 0
  #held: Promise<unknown> | undefined

  constructor(run: Stepping) {
    this.#run = run
  }

  /** Set while work is done between two steps: no gradient may be computed and no step may end before it resolves. */
  get held(): Promise<unknown> | undefined {
    return this.#held
  }

  /**
   * Does `work`, holding the run between two steps until it is done. Throws STEP_INCOMPLETE, which says `what` had to
   * wait.
   */
  async between<T>(what: string, work: () => Promise<T>): Promise<T> {
    assert(this.#held === undefined, 'one thing at a time is done between two steps')
    const working = this.#run.settled().then(() => {
      this.#run.checkBetween(what)
      return work()
    })
    this.#held = Promise.allSettled([working])
    try {
      return await working
    } finally {
      this.#held = undefined
    }
  }

  /**
   * Does `work`; where that throws STEP_INCOMPLETE the end of the step is waited for, and it is tried again. Throws
   * the errors of `work`, STEP_INCOMPLETE too where the step does not end in time or `closing` aborts, and OVERLOADED
   * where MOST_WAITING wait already.
   */
  async reach<T>(work: () => Promise<T>, closing: AbortSignal): Promise<T> {
    const signal = AbortSignal.any([AbortSignal.timeout(MOST_MS), closing])
    for (;;) {
      try {
        return await work()
      } catch (error) {
        if (!(error instanceof ServiceError) || error.code !== 'STEP_INCOMPLETE' || signal.aborted) throw error
        if (this.#run.begun) await this.#receipt(signal)
      }
    }
  }

  async #receipt(signal: AbortSignal): Promise<void> {
    if (this.#waiting >= MOST_WAITING) {
      const message = `${this.#waiting} requests wait for a step of run '${this.#run.name}' to end, at most ${MOST_WAITING} may`
      throw new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 })
    }
    this.#waiting += 1
    const ended = once(this.#run, 'receipt', { signal })
    await Promise.allSettled([ended])
    this.#waiting -= 1
  }
}
