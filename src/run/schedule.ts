import { isDeepStrictEqual } from 'node:util'
import { ServiceError } from '../errors.js'
import { type Groups, updateGroup } from '../optimizer/hyperparameters.js'
import type { MaxLogits } from '../optimizer/qk-clip.js'

/** What a `step` frame says, with its defaults filled in: two that mean the same compare equal. */
export type StepValues = {
  groups: Record<string, Record<string, unknown>>
  gradient_scale: number
  max_logits: MaxLogits
}

/** A step's hyperparameters: `frame` is what the client sent for it, `groups` what holds. */
export type StepSettings = { frame: StepValues; groups: Groups; gradient_scale: number }

const NOTHING_SAID: StepValues = { groups: {}, gradient_scale: 1, max_logits: new Map() }

/**
 * The hyperparameters of a run, step by step. They are sticky: what a `step` frame sets holds from that step on.
 * The last finished step's are kept because a replay computes with them.
 */
export class Schedule {
  /** Of the last finished step. */
  last: StepSettings | undefined
  /** Of the step in progress. */
  current: StepSettings
  #before: Groups
  #said = false
  #begun = false
  #replacement: Groups | undefined

  /** `groups` hold for the step in progress unless its `step` frame says more; `last` is what held in the one before. */
  constructor(groups: Groups, last?: StepSettings) {
    this.#before = groups
    this.last = last
    this.current = { frame: NOTHING_SAID, groups, gradient_scale: 1 }
  }

  /** What the step in progress begins with. */
  get before(): Groups {
    return this.#before
  }

  /** Computes the step in progress with what it was computed with before. */
  repeat(settings: StepSettings): void {
    this.current = settings
    this.#said = true
    this.#begun = true
  }

  /** Takes a `step` frame for the step in progress. Said again it must be identical; nothing changes where it is refused. */
  set(values: StepValues, step: number): void {
    if (this.#said || this.#begun) return this.confirm(this.current, values, step)
    const groups = new Map(this.#before)
    for (const [name, changes] of Object.entries(values.groups)) {
      const group = groups.get(name)
      if (group === undefined) throw new ServiceError('HYPERPARAMETER_INVALID', `there is no group '${name}'`, { step })
      groups.set(name, updateGroup(group, changes))
    }
    if (!Number.isFinite(values.gradient_scale)) {
      throw new ServiceError(
        'HYPERPARAMETER_INVALID',
        `gradient_scale is ${values.gradient_scale}, expected a finite number`,
        { step },
      )
    }
    this.current = { frame: values, groups, gradient_scale: values.gradient_scale }
    this.#said = true
  }

  /** Refuses a repeated `step` frame that differs from what its step has. */
  confirm(settings: StepSettings, values: StepValues, step: number): void {
    if (isDeepStrictEqual(settings.frame, values)) return
    throw new ServiceError('STEP_CONFLICT', `step ${step} has begun with other values than this step frame gives`, {
      step,
    })
  }

  /** A gradient of the step in progress has come: from here on its values hold. */
  begin(): void {
    this.#begun = true
  }

  /** The connection is gone and no parameter was applied: what it said about the step goes with it. */
  forget(): void {
    this.#begun = false
    this.#said = false
    this.current = { frame: NOTHING_SAID, groups: this.#before, gradient_scale: 1 }
  }

  /** New values for every group from the next step that nothing has been applied for. */
  replace(groups: Groups, stepIsUntouched: boolean): void {
    this.#replacement = groups
    if (!stepIsUntouched) return
    this.#before = groups
    this.#replacement = undefined
    this.forget()
  }

  /** The step in progress is finished; the next one starts with its values. */
  finish(): void {
    this.last = this.current
    this.#before = this.#replacement ?? this.current.groups
    this.#replacement = undefined
    this.forget()
  }
}
