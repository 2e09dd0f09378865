import { once } from 'node:events'
import { ServiceError } from '../errors.js'
import type { Run } from './run.js'

/** How many may wait for the step in progress to end, and how long. */
export const MOST_WAITING = 8
const MOST_MS = 30_000

/** Where one step of a run has ended and the next has not begun, for those who do not know when that is. */
export class Boundary {
  readonly #run: Run
  #waiting = 0

  constructor(run: Run) {
    this.#run = run
  }

  /**
   * Does `work`; where that throws STEP_INCOMPLETE the end of the step is waited for, and it is tried again. Throws what `work`
   * throws, STEP_INCOMPLETE too where the step does not end in time or `closing` aborts, and OVERLOADED where MOST_WAITING wait already.
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
