import { ServiceError } from '../../errors.js'
import type { Step } from './step.js'

/** The two steps of a run that may still be asked for: the one in progress, and the last finished one. */
export class Steps {
  readonly #run: string
  #current: Step
  #finished: Step | undefined

  /** `run` is the run's name, for messages. */
  constructor(run: string, first: Step) {
    this.#run = run
    this.#current = first
  }

  /** The step in progress. */
  get current(): Step {
    return this.#current
  }

  /** The last finished step. Undefined before the first one. */
  get finished(): Step | undefined {
    return this.#finished
  }

  /** The one that has the number, if there is one. */
  find(number: number): Step | undefined {
    return [this.#current, this.#finished].find((known) => known?.number === number)
  }

  /** The one that has the number. Throws STEP_CONFLICT with the number that is expected; `what` begins its message. */
  of(number: number, what: string): Step {
    const step = this.find(number)
    if (step) return step
    throw this.#conflict(what, { step: number })
  }

  /**
   * The step that a parameter's gradient is to be applied in, or computed again: that takes a finished step which has
   * applied the parameter, and the state that it left. Throws STEP_CONFLICT.
   */
  ofGradient({ index, name }: { index: number; name: string }, number: number, imported: boolean): Step {
    if (number === this.#current.number) return this.#current
    const replayed = number === this.#finished?.number && this.#finished.hasApplied(index) ? this.#finished : undefined
    if (replayed && !imported) return replayed
    const since = replayed ? ', and its state was imported since' : ''
    throw this.#conflict(`a gradient of '${name}' for step ${number}`, { step: number, parameter: index, since })
  }

  /** The step in progress is finished: the next one is in progress. */
  finish(): void {
    this.#finished = this.#current
    this.#current = this.#current.finish()
  }

  /** Goes to where a checkpoint is. */
  restore(finished: Step | undefined, current: Step): void {
    this.#finished = finished
    this.#current = current
  }

  #conflict(
    what: string,
    { since = '', ...where }: { step: number; parameter?: number; since?: string },
  ): ServiceError {
    const expected_step = this.#current.number
    const counted = where.step < 1 ? '; steps count from 1' : ''
    const message = `${what}: run '${this.#run}' has finished step ${expected_step - 1}${since}, expected is step ${expected_step}${counted}`
    return new ServiceError('STEP_CONFLICT', message, { ...where, expected_step })
  }
}
