import assert from 'node:assert'
import { isDeepStrictEqual } from 'node:util'
import { ServiceError } from '../../errors.js'
import { type Groups, updateGroup } from '../../optimizer/hyperparameters.js'
import { isWithin, largestLogits, type MaxLogits } from '../../optimizer/qk-clip.js'
import type { Contribution } from '../../wire/frame.js'
import type { Member } from '../members/member.js'
import { StepClock } from './clock.js'

/** The values of a `step` frame with its defaults filled in: two frames that mean the same compare equal. */
export type StepValues = {
  groups: Record<string, Record<string, unknown>>
  gradient_scale: number
  max_logits: MaxLogits
}

/** What a `step` frame gives of a step's hyperparameters: what it leaves out is as in the frames of others. */
type Given = Partial<Omit<StepValues, 'max_logits'>>

/** What a member has said of a step; its max_logits are undefined where it is not known any more who gave what. */
type Said = { replica: number; given: Given; max_logits: MaxLogits | undefined }

/** A step's hyperparameters: `frame` has the values that the client sent for it, `groups` all that are in force. */
export type StepSettings = { frame: StepValues; groups: Groups; gradient_scale: number }

/** Of a step that was finished before this process has known of it. */
type Finished = { applied: Iterable<number>; contributors: Iterable<Contribution> }

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
 * for the steps after it, too. They are rank 0's, and max_logits are the largest of all members. With several replicas
 * the rank 0 of each may give them, and no two may give other ones; max_logits are those of the replicas that the step
 * is closed with.
 */
export class Step {
  readonly number: number
  readonly clock = new StepClock()
  /** The span of the first member that the step's span is below, as its newest `step` frame has it. */
  traceparent: string | undefined
  #state: StepState = 'untouched'
  #settings: StepSettings
  /** In force when the step began. */
  #before: Groups
  /** In force from the next step on, where an `open` in the middle of this one gave groups. */
  #replacement: Groups | undefined
  readonly #applied = new Set<number>()
  /** The members that have begun the step. */
  readonly #said = new Map<number, Said>()
  /** The replicas that the step is the mean of, and their weights; empty before they are known. */
  readonly #contributors = new Map<number, number>()
  /** The replicas that the step was closed without. */
  readonly #leftOut = new Set<number>()
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
   * A step that was finished before this process has known of it, with the indices of the parameters that it applied
   * and the replicas that it is the mean of.
   */
  static finished(number: number, settings: StepSettings, { applied, contributors }: Finished): Step {
    const step = new Step(number, settings.groups)
    step.#settings = settings
    for (const index of applied) step.#applied.add(index)
    step.close(contributors)
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

  /** The replicas that the step is the mean of, in order, and the weight of each; empty before they are known. */
  get contributors(): Contribution[] {
    const all = [...this.#contributors].map(([replica, weight]) => ({ replica, weight }))
    return all.sort((one, other) => one.replica - other.replica)
  }

  /** The weight of a replica that the step was closed with. */
  weightOf(replica: number): number | undefined {
    return this.#contributors.get(replica)
  }

  /** Whether the step was closed without a replica. */
  isLeftOut(replica: number): boolean {
    return this.#leftOut.has(replica) || (this.#state === 'finished' && !this.#contributors.has(replica))
  }

  /** Replicas that come too late to be part of the step. */
  leaveOut(replica: number): void {
    this.#leftOut.add(replica)
  }

  /** From now on the step is the mean of these replicas, and of those that it was closed with before. */
  close(contributors: Iterable<Contribution>): void {
    for (const { replica, weight } of contributors) this.#contributors.set(replica, weight)
    if (this.#state === 'announced') this.#combine()
  }

  /** Nothing of the step could be applied: those who are not left out may go on with it. */
  reopen(): void {
    if (this.#applied.size > 0) return
    this.#contributors.clear()
    this.#combine()
  }

  /**
   * Takes the values of a member's `step` frame. Hyperparameters are rank 0's to give; another member may repeat them
   * after it. Once a member's values are fixed a frame that says the same is accepted, another one is refused with
   * STEP_CONFLICT; HYPERPARAMETER_INVALID is thrown for values that no step can have. A refusal changes no value.
   */
  announce(member: Member, given: Partial<StepValues>): void {
    this.refuse(member)
    if (this.#said.has(member.id) || this.begun || this.#state === 'finished') this.#confirm(member, given)
    else if (member.rank === 0) this.#fix(member, given)
    else this.#contribute(member, given)
    this.#refused.delete(member)
  }

  /** Whether so many members, all of a run, have begun the step: nothing of it is computed before. */
  isBegunByAll(members: number): boolean {
    return this.#said.size === members
  }

  /** Whether a member has begun the step. */
  isBegunBy(id: number): boolean {
    return this.#said.has(id)
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
  begin(member: Member): boolean {
    if (this.#said.has(member.id)) return false
    const max_logits = this.#state === 'untouched' || this.#state === 'announced' ? NO_LOGITS : undefined
    this.#say(member, { given: {}, max_logits })
    return true
  }

  /** Computes with the values of a step of the journal, whatever is in force. */
  repeat(settings: StepSettings, contributors: Iterable<Contribution>): void {
    assert(this.#state === 'untouched', 'a step of the journal is computed before any other frame of it comes')
    this.#settings = settings
    const { max_logits, ...given } = settings.frame
    this.#said.set(0, { replica: 0, given, max_logits })
    for (const { replica, weight } of contributors) this.#contributors.set(replica, weight)
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
  forget({ id }: Pick<Member, 'id'>): void {
    if (this.#state !== 'announced' || this.#contributors.size > 0 || !this.#said.delete(id)) return
    this.#settle()
    if (this.#said.size === 0) this.#state = 'untouched'
  }

  /** Other members go on with the step: each of them has to begin it. */
  forgetAll(): void {
    for (const id of [...this.#said.keys()]) this.forget({ id })
    this.#said.clear()
    this.#leftOut.clear()
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
    this.#settle()
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

  /** Takes the values of a rank 0, which has not begun the step. */
  #fix(member: Member, { max_logits = NO_LOGITS, ...given }: Partial<StepValues>): void {
    if (isNothing(given)) return this.#say(member, { given: {}, max_logits })
    if (this.#giver) this.#checkRepeated(member, given)
    else this.#settings = this.#settingsOf(given)
    this.#say(member, { given, max_logits })
  }

  /** Takes the max_logits of another rank than 0. */
  #contribute(member: Member, { max_logits = NO_LOGITS, ...given }: Partial<StepValues>): void {
    if (!this.#said.has(member.id - member.rank) && !isNothing(given))
      throw this.#conflict(`${member.name} gives values of step ${this.number} before rank 0 has begun it`)
    this.#checkRepeated(member, given)
    this.#say(member, { given: {}, max_logits })
  }

  /** The hyperparameters that a rank 0 has given for the step; undefined where none has. */
  get #giver(): Given | undefined {
    return [...this.#said.values()].find(({ given }) => !isNothing(given))?.given
  }

  #settingsOf(given: Given): StepSettings {
    const step = this.number
    const frame = { ...NO_VALUES, ...given }
    const groups = new Map(this.#before)
    for (const [name, changes] of Object.entries(frame.groups)) {
      const group = groups.get(name)
      if (group === undefined) throw new ServiceError('HYPERPARAMETER_INVALID', `there is no group '${name}'`, { step })
      groups.set(name, updateGroup(group, changes))
    }
    const { gradient_scale } = frame
    if (!Number.isFinite(gradient_scale)) {
      const message = `gradient_scale is ${gradient_scale}, expected a finite number`
      throw new ServiceError('HYPERPARAMETER_INVALID', message, { step })
    }
    return { frame, groups, gradient_scale }
  }

  /** Makes the step's values anew of what its members have said. */
  #settle(): void {
    this.#settings = this.#settingsOf(this.#giver ?? {})
    this.#combine()
  }

  #say({ id, replica }: Member, said: Omit<Said, 'replica'>): void {
    this.#said.set(id, { replica, ...said })
    this.clock.begin()
    if (this.#state === 'untouched') this.#state = 'announced'
    if (this.#state === 'announced') this.#combine()
  }

  /** The max_logits of the step: the largest that a member has given for each head. */
  #combine(): void {
    const { frame, ...rest } = this.#settings
    const isPart = (replica: number) => this.#contributors.size === 0 || this.#contributors.has(replica)
    /* c8 ignore next 3 -- a member that has said nothing of its own */
    const given = [...this.#said.values()].flatMap(({ replica, max_logits }) =>
      max_logits && isPart(replica) ? [max_logits] : [],
    )
    this.#settings = { ...rest, frame: { ...frame, max_logits: given.reduce(largestLogits, NO_LOGITS) } }
  }

  #confirm(member: Member, { max_logits = NO_LOGITS, ...given }: Partial<StepValues>): void {
    const { frame } = this.#settings
    const isOnly = member.world_size === 1 && member.replicas === 1
    const speaks = member.rank === 0 && member.replicas === 1
    this.#checkRepeated(member, speaks ? { groups: {}, gradient_scale: 1, ...given } : given)
    const before = isOnly ? frame.max_logits : this.#said.get(member.id)?.max_logits
    /* c8 ignore next -- a member repeats what others have said */
    if (before ? isDeepStrictEqual(before, max_logits) : isWithin(max_logits, frame.max_logits)) {
      const { id, replica } = member
      if (!this.#said.has(id)) this.#said.set(id, { replica, given: {}, max_logits: undefined })
      return
    }
    const message = isOnly
      ? `step ${this.number} has begun with other values than this step frame gives`
      : `${member.name} has begun step ${this.number} with other max_logits than its step frame gives`
    throw this.#conflict(message)
  }

  /** Throws STEP_CONFLICT where a member gives other hyperparameters than the step has. */
  #checkRepeated(member: Member, given: Given): void {
    const { groups, gradient_scale } = this.#settings.frame
    if (isDeepStrictEqual({ groups, gradient_scale, ...given }, { groups, gradient_scale })) return
    throw this.#conflict(`step ${this.number} has begun with other values than this step frame gives${whoseOf(member)}`)
  }

  #conflict(message: string): ServiceError {
    const { number: step, expected: expected_step } = this
    return new ServiceError('STEP_CONFLICT', message, { step, expected_step })
  }
}

/** Whether a `step` frame gives no hyperparameters. */
function isNothing({ groups, gradient_scale }: Given): boolean {
  return groups === undefined && gradient_scale === undefined
}

/** Which member's `step` frame has values that it may not give, for messages; nothing for who may give them. */
function whoseOf({ name, rank, replicas }: Member): string {
  if (rank > 0) return ` of ${name}, which are rank 0's to give`
  return replicas > 1 ? ` of ${name}` : ''
}
