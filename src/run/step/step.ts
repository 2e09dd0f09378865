import assert from 'node:assert'
import { isDeepStrictEqual } from 'node:util'
import { ServiceError } from '../../errors.js'
import { type Groups, updateGroup } from '../../optimizer/hyperparameters.js'
import type { MaxLogits } from '../../optimizer/qk-clip.js'
import type { StepSeconds } from '../../wire/frame.js'
import type { Member } from './member.js'

/** The values of a `step` frame with its defaults filled in: two frames that mean the same compare equal. */
export type StepValues = {
  groups: Record<string, Record<string, unknown>>
  gradient_scale: number
  max_logits: MaxLogits
}

/** A step's hyperparameters: `frame` has the values that the client sent for it, `groups` all that are in force. */
export type StepSettings = { frame: StepValues; groups: Groups; gradient_scale: number }

/** Seconds that a step has spent in each phase, summed over its parameters. */
export type Seconds = { -readonly [Phase in keyof StepSeconds]: number }

/**
 * How far a step has come:
 * - `untouched`: none of its frames has come.
 * - `announced`: its values are fixed, by its `step` frame or by its first gradient.
 * - `applying`: a gradient was applied, so the values cannot be forgotten any more.
 * - `ending`: every parameter was applied or skipped, and the journal is writing the step.
 * - `finished`: it has a receipt. It is kept, because its gradients may be sent again: a replay computes with its
 *   values.
 */
export type StepState = 'untouched' | 'announced' | 'applying' | 'ending' | 'finished'

const NO_VALUES: StepValues = { groups: {}, gradient_scale: 1, max_logits: new Map() }

/**
 * One step of a run, from its first frame to its receipt: its values, the parameters that were applied for it, what
 * its members were refused, and where its time went. Hyperparameters are sticky: the values of a `step` frame hold
 * for the steps after it, too.
 */
export class Step {
  readonly number: number
  #state: StepState = 'untouched'
  #settings: StepSettings
  /** In force when the step began. */
  #before: Groups
  /** In force from the next step on, where an `open` in the middle of this one gave groups. */
  #replacement: Groups | undefined
  readonly #applied = new Set<number>()
  /** Members whose newest `step` frame was refused. A lost member is forgotten with its connection. */
  readonly #refused = new WeakSet<Member>()
  readonly #seconds: Seconds = { receive: 0, queue: 0, compute: 0, send: 0 }
  #next: Step | undefined

  /** `groups` are in force unless the `step` frame changes them. */
  constructor(number: number, groups: Groups) {
    this.number = number
    this.#before = groups
    this.#settings = { frame: NO_VALUES, groups, gradient_scale: 1 }
  }

  /**
   * A step that was finished before this process has known of it, with the indices of the parameters that it applied.
   */
  static finished(number: number, settings: StepSettings, applied: Iterable<number>): Step {
    const step = new Step(number, settings.groups)
    step.#settings = settings
    for (const index of applied) step.#applied.add(index)
    step.#state = 'finished'
    return step
  }

  get settings(): StepSettings {
    return this.#settings
  }

  /** In force when the step began. */
  get groupsBefore(): Groups {
    return this.#before
  }

  /** The indices of the parameters that were applied for it, in order. */
  get applied(): number[] {
    return [...this.#applied].sort((a, b) => a - b)
  }

  hasApplied(index: number): boolean {
    return this.#applied.has(index)
  }

  get seconds(): Readonly<Seconds> {
    return this.#seconds
  }

  /** Whether the step is more than announced: it can only be ended now, not forgotten. */
  get begun(): boolean {
    return this.#state === 'applying' || this.#state === 'ending'
  }

  /** The number of the step that the run waits for, this one or the next: every STEP_CONFLICT tells it. */
  get expected(): number {
    return this.#state === 'finished' ? this.number + 1 : this.number
  }

  /**
   * Takes the values of a member's `step` frame. Once the values are fixed a frame that says the same is accepted,
   * another one is refused with STEP_CONFLICT; HYPERPARAMETER_INVALID is thrown for values that no step can have. A
   * refusal changes no value.
   */
  announce(member: Member, values: StepValues): void {
    this.refuse(member)
    if (this.#state === 'untouched') this.#fix(values)
    else this.#confirm(values)
    this.#refused.delete(member)
  }

  /** A `step` frame of this member was refused: nothing of its part is taken before it has sent another one. */
  refuse(member: Member): void {
    this.#refused.add(member)
  }

  /**
   * Throws STEP_CONFLICT after a refused `step` frame: what was streamed behind it must not be applied with older
   * values.
   */
  checkAccepted(member: Member): void {
    if (!this.#refused.has(member)) return
    const { number: step, expected: expected_step } = this
    throw new ServiceError('STEP_CONFLICT', `the step frame of step ${step} was refused, send it again`, {
      step,
      expected_step,
    })
  }

  /** A gradient's first chunk has come: the values are fixed from here on. */
  begin(): void {
    if (this.#state === 'untouched') this.#state = 'announced'
  }

  /** Computes with the values of a step of the journal, whatever is in force. */
  repeat(settings: StepSettings): void {
    assert(this.#state === 'untouched', 'a step of the journal is computed before any other frame of it comes')
    this.#settings = settings
    this.#state = 'announced'
  }

  /** The gradient of a parameter was applied. */
  apply(index: number): void {
    assert(this.#state === 'announced' || this.#state === 'applying', `a gradient was applied in a step ${this.#state}`)
    this.#applied.add(index)
    this.#state = 'applying'
  }

  /**
   * The member whose frames fixed the values is gone. Unless something was applied with them, another may give
   * others.
   */
  forget(): void {
    if (this.#state !== 'announced') return
    this.#state = 'untouched'
    this.#settings = { frame: NO_VALUES, groups: this.#before, gradient_scale: 1 }
  }

  /**
   * Puts other groups in force: from this step on where nothing was applied for it, otherwise, or if asked, from the
   * next.
   */
  replace(groups: Groups, from: 'this' | 'next' = this.#applied.size === 0 ? 'this' : 'next'): void {
    if (from === 'next') {
      this.#replacement = groups
      return
    }
    this.#before = groups
    this.#replacement = undefined
    this.#state = 'announced'
    this.forget()
  }

  /** Adds to the time spent in a phase. The time of a replay counts for the step that it has delayed. */
  spend(phase: keyof Seconds, seconds: number): void {
    const step = this.#next ?? this
    step.#seconds[phase] += seconds
  }

  /** Has `commit` write the step; where that fails the step is where it was, and may be ended again. */
  async end(commit: () => Promise<void>): Promise<void> {
    const before = this.#state
    this.#state = 'ending'
    try {
      await commit()
    } catch (error) {
      this.#state = before
      throw error
    }
  }

  /** The step has its receipt; answers the step after it. */
  finish(): Step {
    this.#state = 'finished'
    this.#next = new Step(this.number + 1, this.#replacement ?? this.#settings.groups)
    return this.#next
  }

  #fix(values: StepValues): void {
    const step = this.number
    const groups = new Map(this.#before)
    for (const [name, changes] of Object.entries(values.groups)) {
      const group = groups.get(name)
      if (group === undefined) throw new ServiceError('HYPERPARAMETER_INVALID', `there is no group '${name}'`, { step })
      groups.set(name, updateGroup(group, changes))
    }
    const { gradient_scale } = values
    if (!Number.isFinite(gradient_scale)) {
      const message = `gradient_scale is ${gradient_scale}, expected a finite number`
      throw new ServiceError('HYPERPARAMETER_INVALID', message, { step })
    }
    this.#settings = { frame: values, groups, gradient_scale }
    this.#state = 'announced'
  }

  #confirm(values: StepValues): void {
    if (isDeepStrictEqual(this.#settings.frame, values)) return
    const { number: step, expected: expected_step } = this
    const message = `step ${step} has begun with other values than this step frame gives`
    throw new ServiceError('STEP_CONFLICT', message, { step, expected_step })
  }
}
