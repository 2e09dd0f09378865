import assert from 'node:assert'
import { isDeepStrictEqual } from 'node:util'
import { ServiceError } from '../../errors.js'
import { type Groups, updateGroup } from '../../optimizer/hyperparameters.js'
import { isWithin, largestLogits, type MaxLogits } from '../../optimizer/qk-clip.js'
import { StepClock } from './clock.js'
import type { Member } from './member.js'

/** The values of a `step` frame with its defaults filled in: two frames that mean the same compare equal. */
export type StepValues = {
  groups: Record<string, Record<string, unknown>>
  gradient_scale: number
  max_logits: MaxLogits
}

/** A step's hyperparameters: `frame` has the values that the client sent for it, `groups` all that are in force. */
export type StepSettings = { frame: StepValues; groups: Groups; gradient_scale: number }

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

const NO_LOGITS: MaxLogits = new Map()
const NO_VALUES: StepValues = { groups: {}, gradient_scale: 1, max_logits: NO_LOGITS }

/**
 * One step of a run, from its first frame to its receipt: its values, the parameters that were applied for it, what
 * its members were refused, and where its time went. Hyperparameters are sticky: the values of a `step` frame hold
 * for the steps after it, too. They are rank 0's, and max_logits are the largest of all members.
 */
export class Step {
  readonly number: number
  readonly clock = new StepClock()
  /** The span of rank 0 that the step's span is below, as its newest `step` frame has it. */
  traceparent: string | undefined
  #state: StepState = 'untouched'
  #settings: StepSettings
  /** In force when the step began. */
  #before: Groups
  /** In force from the next step on, where an `open` in the middle of this one gave groups. */
  #replacement: Groups | undefined
  readonly #applied = new Set<number>()
  /**
   * The ranks that have begun the step, and the max_logits that each has given for it; undefined for a rank that has
   * begun a step again of which it is not known any more who gave what.
   */
  readonly #said = new Map<number, MaxLogits | undefined>()
  /** Members whose newest `step` frame was refused. A lost member is forgotten with its connection. */
  readonly #refused = new WeakSet<Member>()
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

  /** Whether the step is more than announced: it can only be ended now, not forgotten. */
  get begun(): boolean {
    return this.#state === 'applying' || this.#state === 'ending'
  }

  /** The number of the step that the run waits for, this one or the next: every STEP_CONFLICT tells it. */
  get expected(): number {
    return this.#state === 'finished' ? this.number + 1 : this.number
  }

  /**
   * Takes the values of a member's `step` frame. Hyperparameters are rank 0's to give; another member may repeat them
   * after it. Once a member's values are fixed a frame that says the same is accepted, another one is refused with
   * STEP_CONFLICT; HYPERPARAMETER_INVALID is thrown for values that no step can have. A refusal changes no value.
   */
  announce(member: Member, given: Partial<StepValues>): void {
    this.refuse(member)
    const { rank } = member
    if (this.#said.has(rank) || this.begun || this.#state === 'finished') this.#confirm(member, given)
    else if (rank === 0) this.#fix({ ...NO_VALUES, ...given })
    else this.#contribute(rank, given)
    this.#refused.delete(member)
  }

  /** Whether every member has begun the step: nothing of it is computed before. */
  isBegunByAll(world_size: number): boolean {
    return this.#said.size === world_size
  }

  /** Whether a rank has begun the step. */
  isBegunBy(rank: number): boolean {
    return this.#said.has(rank)
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

  /**
   * A gradient's first chunk or the `end` of a member has come: its values are fixed from here on. Answers whether the
   * member had not begun the step before.
   */
  begin({ rank }: Member): boolean {
    if (this.#said.has(rank)) return false
    this.#say(rank, this.#state === 'untouched' || this.#state === 'announced' ? NO_LOGITS : undefined)
    return true
  }

  /** Computes with the values of a step of the journal, whatever is in force. */
  repeat(settings: StepSettings): void {
    assert(this.#state === 'untouched', 'a step of the journal is computed before any other frame of it comes')
    this.#settings = settings
    this.#said.set(0, settings.frame.max_logits)
    this.#state = 'announced'
  }

  /** The gradient of a parameter was applied. */
  apply(index: number): void {
    assert(this.#state === 'announced' || this.#state === 'applying', `a gradient was applied in a step ${this.#state}`)
    this.#applied.add(index)
    this.#state = 'applying'
  }

  /**
   * A member is gone, and has not begun the step unless something was applied: whoever takes its place may give other
   * values.
   */
  forget({ rank }: Pick<Member, 'rank'>): void {
    if (this.#state !== 'announced' || !this.#said.delete(rank)) return
    if (rank === 0) this.#settings = { frame: NO_VALUES, groups: this.#before, gradient_scale: 1 }
    this.#combine()
    if (this.#said.size === 0) this.#state = 'untouched'
  }

  /** Other members go on with the step: each of them has to begin it. */
  forgetAll(): void {
    for (const rank of [...this.#said.keys()]) this.forget({ rank })
    this.#said.clear()
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
    this.#said.delete(0)
    this.#settings = { frame: { ...NO_VALUES, max_logits: NO_LOGITS }, groups, gradient_scale: 1 }
    this.#combine()
    /* c8 ignore next -- rank 0 is lost alone, or with others that have spoken */
    this.#state = this.#said.size === 0 ? 'untouched' : 'announced'
  }

  /** Adds to the time spent in a phase. The time of a replay counts for the step that it has delayed. */
  spend(...spent: Parameters<StepClock['spend']>): void {
    const { clock } = this.#next ?? this
    clock.spend(...spent)
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
    this.#say(0, values.max_logits)
  }

  /** Takes the max_logits of another rank than 0. */
  #contribute(rank: number, { max_logits = NO_LOGITS, ...values }: Partial<StepValues>): void {
    if (!this.#said.has(0) && !isNothing(values))
      throw this.#conflict(`rank ${rank} gives values of step ${this.number} before rank 0 has begun it`)
    this.#checkRepeated(rank, values)
    this.#say(rank, max_logits)
  }

  #say(rank: number, max_logits: MaxLogits | undefined): void {
    this.#said.set(rank, max_logits)
    this.clock.begin()
    if (this.#state === 'untouched') this.#state = 'announced'
    if (this.#state === 'announced') this.#combine()
  }

  /** The max_logits of the step: the largest that a member has given for each head. */
  #combine(): void {
    const { frame, ...rest } = this.#settings
    /* c8 ignore next -- a member that has said nothing of its own */
    const given = [...this.#said.values()].flatMap((logits) => (logits ? [logits] : []))
    this.#settings = { ...rest, frame: { ...frame, max_logits: given.reduce(largestLogits, NO_LOGITS) } }
  }

  #confirm({ rank, world_size }: Member, given: Partial<StepValues>): void {
    const { max_logits = NO_LOGITS, ...values } = given
    const { frame } = this.#settings
    const all = world_size === 1
    this.#checkRepeated(rank, rank === 0 ? { groups: {}, gradient_scale: 1, ...values } : values)
    const before = all ? frame.max_logits : this.#said.get(rank)
    /* c8 ignore next -- a member repeats what others have said */
    if (before ? isDeepStrictEqual(before, max_logits) : isWithin(max_logits, frame.max_logits)) {
      if (!this.#said.has(rank)) this.#said.set(rank, undefined)
      return
    }
    const message = all
      ? `step ${this.number} has begun with other values than this step frame gives`
      : `rank ${rank} has begun step ${this.number} with other max_logits than its step frame gives`
    throw this.#conflict(message)
  }

  /** Throws STEP_CONFLICT where a rank gives other hyperparameters than rank 0 has. */
  #checkRepeated(rank: number, values: Partial<Omit<StepValues, 'max_logits'>>): void {
    const { groups, gradient_scale } = this.#settings.frame
    if (isDeepStrictEqual({ groups, gradient_scale, ...values }, { groups, gradient_scale })) return
    const whose = rank === 0 ? '' : ` of rank ${rank}, which are rank 0's to give`
    throw this.#conflict(`step ${this.number} has begun with other values than this step frame gives${whose}`)
  }

  #conflict(message: string): ServiceError {
    const { number: step, expected: expected_step } = this
    return new ServiceError('STEP_CONFLICT', message, { step, expected_step })
  }
}

/** Whether a `step` frame gives no hyperparameters. */
function isNothing({ groups, gradient_scale }: Partial<StepValues>): boolean {
  return groups === undefined && gradient_scale === undefined
}
