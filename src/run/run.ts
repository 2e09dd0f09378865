import assert from 'node:assert'
import { EventEmitter } from 'node:events'
import type { Grant } from '../device/admission.js'
import type { Device } from '../device/device.js'
import type { RunStaging } from '../device/run-staging.js'
import { ServiceError } from '../errors.js'
import type { Attention } from '../optimizer/attention.js'
import { type Groups, groupOf } from '../optimizer/hyperparameters.js'
import { describe, type Parameter } from '../optimizer/parameter.js'
import { type AppliedRecord, type RunRecord, UnreadableError } from '../store/checkpoint/manifest.js'
import type { Journal } from '../store/journal/journal.js'
import type { EndHead } from '../store/journal/journal-format.js'
import { Underway } from '../underway.js'
import type { Contribution, OpenedFrame, ParameterDescription } from '../wire/frame.js'
import { Boundary } from './boundary.js'
import { type Finished, History, type Pace, type Receipt, type Refusal, Refusals, type RunEvents } from './history.js'
import { importNote, type PendingImport } from './imported-state.js'
import { Journaling } from './journaling.js'
import type { Layout } from './members/layout.js'
import type { Connection, Member, Seat } from './members/member.js'
import type { Answer, Place, PlaceRow } from './place.js'
import { groupRecords, groupsOf, settingsOf, settingsRecord } from './record.js'
import type { RestoredState, RunOptions } from './run-options.js'
import { type MeasuredRecord, Shard } from './shard.js'
import { Snapshot } from './snapshot.js'
import { conclude, effectiveGroups } from './step/conclusion.js'
import { Intake } from './step/intake.js'
import { measured } from './step/measured.js'
import type { Whole } from './step/part.js'
import { Step, type StepSettings } from './step/step.js'
import { Steps } from './step/steps.js'

/**
 * One training run: the order of its steps, their history, and who sends them. The only writer of all of that.
 * State is immutable: a step computes new tensors, and a commit swaps the references.
 */
export class Run extends EventEmitter<RunEvents> {
  readonly name: string
  readonly created_at: string
  readonly boundary: Boundary
  /** What the run's members send. */
  readonly intake: Intake
  readonly #device: Device
  readonly #shard: Shard
  readonly #history: History
  /** The newest errors that members were told. */
  readonly refusals = new Refusals()
  readonly #steps: Steps
  #epoch = 0
  #note = ''
  readonly #journaling: Journaling
  #isGone = false
  /** Jobs that were not committed or dropped yet, and steps that the journal is writing. */
  readonly #work = new Underway()

  constructor(device: Device, { name, created_at, groups, receipts, ...rest }: RunOptions) {
    super()
    // Event streams and requests for checkpoints listen, and both are bounded where they begin.
    this.setMaxListeners(0)
    this.#device = device
    this.name = name
    this.created_at = created_at ?? new Date().toISOString()
    this.boundary = new Boundary(this)
    this.#history = new History(receipts)
    this.#shard = new Shard(device, { run: name, ...rest })
    this.#steps = new Steps(name, new Step(1, groups))
    this.#journaling = new Journaling({
      ...{ shard: this.#shard, steps: this.#steps },
      applied: (index, step) => this.intake.applied(index, step),
    })
    this.intake = new Intake(device, {
      ...{ name, parameters: rest.parameters, attentions: rest.attentions, shard: this.#shard, steps: this.#steps },
      held: () => this.boundary.held,
      settled: () => this.settled(),
      stepOfGradient: (index, number) => this.#stepOfGradient(index, number),
      compute: (whole, answer) => this.#compute(whole, answer),
      groups: () => this.groups,
      changed: (status) => void this.emit('member', status),
      last: () => this.#history.last,
      conclude: (step, waited) => this.#conclude(step, waited),
      leftOut: (replicas) => void this.emit('left_out', replicas),
      quorumLost: () => void this.emit('quorum_lost'),
    })
  }

  /** How often the run was opened: a connection of an older epoch has lost it. */
  get epoch(): number {
    return this.#epoch
  }

  /** What a client should know of how the run came here; empty where there is nothing. */
  get note(): string {
    return this.#note
  }

  /** The last finished step. */
  get step(): number {
    return this.#history.step
  }

  /** Of the state that the last finished step, or an import after it, has left. */
  get digest(): string {
    return this.#history.digest
  }

  /** Of the last finished step itself. */
  get stepDigest(): string {
    return this.#history.stepDigest
  }

  /** The memory that the device has granted the run, and where. */
  get grant(): Grant {
    return this.#shard.grant
  }

  /** Where the run's gradients are received. */
  get staging(): RunStaging {
    return this.#shard.staging
  }

  get attentions(): readonly Attention[] {
    return this.#shard.attentions
  }

  get parameters(): readonly Parameter[] {
    return this.#shard.parameters
  }

  /** The groups with the hyperparameters of the step in progress. */
  get groups(): Groups {
    return this.#steps.current.settings.groups
  }

  /** The groups as they were when the step in progress began. */
  get groupsBefore(): Groups {
    return this.#steps.current.groupsBefore
  }

  /**
   * The journal that has every step before it is acknowledged; undefined where a step is only in the next checkpoint.
   */
  get journal(): Journal | undefined {
    return this.#journaling.journal
  }

  /** Whether a connection has the run. */
  get connected(): boolean {
    return this.intake.members.connected.length > 0
  }

  /** Since when no connection has the run, as `performance.now` counts; undefined while one has it. */
  get idleSince(): number | undefined {
    return this.intake.members.idleSince
  }

  /** Bytes of state that it has once every parameter has taken a step. */
  get fullStateBytes(): number {
    return this.#shard.fullStateBytes
  }

  /** Bytes of state that are live. */
  get stateBytes(): number {
    return this.#shard.stateBytes
  }

  /** The parameter at an index that a frame names. Throws PARAMETER_UNKNOWN. */
  parameter(index: number): Parameter {
    return this.#shard.place(index).parameter
  }

  /** The indices that are applied for the step in progress already. */
  get ahead(): number[] {
    return this.#steps.current.applied
  }

  /** Whether the step in progress is more than announced: it may lack nothing but its end. */
  get begun(): boolean {
    return this.#steps.current.begun
  }

  /** Gives a connection its seat in a layout, as `Intake.attach` does: the run has another epoch. */
  async attach(connection: Connection, seat?: Seat, layout?: Layout): Promise<Member> {
    const member = await this.intake.attach(connection, seat, layout)
    this.#epoch += 1
    return member
  }

  /** When every job of this run has been committed or dropped. */
  settled(): Promise<void> {
    return this.#work.below(1)
  }

  /** The answer to an `open` that has found or made the run, but for the parameters; a member is told of the others. */
  opened(resumed: boolean, member?: Member): Omit<OpenedFrame, 'type' | 'limits' | 'server' | 'parameters'> {
    return {
      ...{ run: this.name, epoch: this.epoch, step: this.step, resumed, digest: this.digest },
      ...{ ahead: this.ahead, attentions: this.attentions },
      groups: effectiveGroups(this.groups),
      ...(this.note && { note: this.note }),
      ...(member && this.#membersFor(member)),
    }
  }

  #membersFor({ rank, world_size, replica, replicas }: Member): Partial<OpenedFrame> {
    const { layout, status } = this.intake.members
    if (!layout.named) return {}
    const place = layout.averages ? { replica, replicas } : {}
    const { quorum } = layout
    return { member: { rank, world_size, ...place }, members: status, ...(quorum && { quorum }) }
  }

  /** The parameters as `opened` lists them, one at a time: a large model has many. */
  *describeParameters(): Generator<ParameterDescription> {
    for (const { parameter, appliedStep } of this.#shard.places)
      yield { ...describe(parameter), step: appliedStep, algorithm: this.#algorithm(parameter) }
  }

  /**
   * The row scales of a member's parameters that a finished step, by default the last one, has skipped: QK-clip does
   * not wait for a gradient. One at a time.
   */
  *skippedRowScales(
    member: Member,
    step: Step | undefined = this.#steps.finished,
  ): Generator<{ parameter: number; row_scale: Uint8Array }> {
    assert(step, 'a step was finished')
    for (const scale of this.#shard.skippedRowScales(step)) if (member.has(this.parameter(scale.parameter))) yield scale
  }

  /** How fast it goes; undefined where this process has finished no step of it. */
  get pace(): Pace | undefined {
    return this.#history.pace
  }

  /** A member was told an error. */
  refused(refusal: Refusal): void {
    this.refusals.add(refusal)
    this.emit('refused', refusal)
  }

  receipts(after: number): Finished[] {
    return this.#history.receipts(after)
  }

  /**
   * What the last finished step has come to: the digest before it, its receipt, and what each parameter has added to
   * its digest. Before anything of the next one is applied.
   */
  lastStep(): { previous: string; receipt: Receipt; records: MeasuredRecord[] } {
    const { last: receipt, previous } = this.#history
    const { finished: step } = this.#steps
    assert(receipt && step && !this.begun, 'the last step is told of between two steps')
    return { previous, receipt, records: [...this.#shard.measuredRecords(step)] }
  }

  /** Throws STEP_INCOMPLETE where a parameter was applied for the next step already, and as `checkPresent`. */
  checkBetween(what: string): void {
    this.checkPresent()
    const { number: step, begun } = this.#steps.current
    if (!begun) return
    throw new ServiceError('STEP_INCOMPLETE', `step ${step} of run '${this.name}' has begun, ${what}`, { step })
  }

  /** Throws RESTORING for a run that has left memory while somebody waited for it: its state is not here any more. */
  checkPresent(): void {
    if (!this.#isGone) return
    throw new ServiceError('RESTORING', `run '${this.name}' has left memory meanwhile: ask again`)
  }

  /** Has every step written to a journal before it is acknowledged; undefined: no longer. */
  useJournal(journal: Journal | undefined): void {
    this.#journaling.journal = journal
  }

  /** Ends the journal's files. Later steps are written to none. */
  async closeJournal(): Promise<void> {
    await this.#journaling.journal?.close()
    this.#journaling.journal = undefined
  }

  /**
   * Puts the groups of an `open` in force: from the step in progress on where nothing was applied for it, otherwise,
   * or if asked, from the next.
   */
  replaceGroups(groups: Groups, from?: 'this' | 'next'): void {
    this.#steps.current.replace(groups, from)
  }

  /**
   * All that a checkpoint is made of, as of the last finished step, or with an import after it; the caller releases it.
   * No parameter may be applied for the next step yet.
   */
  snapshot(pending?: PendingImport): Snapshot {
    assert(!this.begun, 'a checkpoint is taken between two steps')
    const { step, previous, last: receipt } = this.#history
    const { digest, imported } = pending ?? this.#history
    const last = this.#steps.finished?.settings
    const head = {
      ...{ run: this.name, created_at: this.created_at, epoch: this.epoch, step, digest, previous_digest: previous },
      attentions: this.attentions,
      groups: groupRecords(this.groupsBefore),
      ...(last && { last: settingsRecord(last) }),
      ...(receipt && { receipt }),
      ...(imported && { imported }),
    }
    return new Snapshot(this.#device, {
      head,
      parameters: this.parameters,
      states: this.#shard.states(pending?.state.places),
    })
  }

  /** Goes on from state that was imported. Between two steps. */
  takeOver({ state, digest, imported }: PendingImport): void {
    this.#shard.takeOver(state.places)
    state.taken()
    this.#history.replace(digest, imported)
    this.#note = importNote(this.step)
  }

  /** Goes to where a checkpoint of this run is. */
  restore(record: RunRecord, { tensors, elsewhere, note }: RestoredState): void {
    this.#shard.restore(record.places, { tensors, elsewhere })
    this.#history.restore(record)
    const applied = record.places.flatMap(({ applied_step }, index) => (applied_step === record.step ? [index] : []))
    const contributors = record.receipt?.contributors ?? []
    const finished = record.last && Step.finished(record.step, settingsOf(record.last), { applied, contributors })
    this.#steps.restore(finished, new Step(record.step + 1, groupsOf(record.groups)))
    this.intake.forget()
    this.#note = note
  }

  /** Counts on from the epoch that the run had in another process. */
  continueEpoch(epoch: number): void {
    this.#epoch = epoch
  }

  /** The step in progress is one of a journal: it is computed with the values and the replicas that it had. */
  repeat(settings: StepSettings, contributors: readonly Contribution[]): void {
    this.#steps.current.repeat(settings, contributors)
  }

  /**
   * A step of a journal, computed again: the gradient of a parameter was applied with this before. Throws
   * UnreadableError where it comes out otherwise, unless another kind of device had computed it.
   */
  acknowledge(index: number, applied: AppliedRecord, elsewhere: boolean): void {
    this.#shard.acknowledge(index, applied, elsewhere)
  }

  /**
   * Ends a step of a journal, which was acknowledged with this receipt. Throws UnreadableError where its digest is
   * another one.
   */
  async endAgain(member: Member, { step, skipped, digest, receipt }: EndHead): Promise<void> {
    const computed = await this.intake.end(member, { step, skipped, weight: 1 })
    assert(typeof computed === 'object', 'a journal is never lost as a member')
    if (computed.digest !== digest)
      throw new UnreadableError(`step ${step} has digest ${computed.digest}, expected ${digest}`)
    this.#history.acknowledge(receipt)
  }

  /** What a parameter's row in REST says. */
  place(index: number): PlaceRow {
    const { parameter, count, record, stateBytes, last } = this.#shard.place(index)
    return { parameter, algorithm: this.#algorithm(parameter), count, record, state_bytes: stateBytes, last }
  }

  /** References to a parameter's state tensors, none before its first step; the caller releases them. */
  stateTensors(index: number): ReturnType<Place['stateTensors']> {
    return this.#shard.place(index).stateTensors()
  }

  /** Gives all memory back. The run has no member and no job any more. */
  dispose(): void {
    this.#isGone = true
    this.intake.close()
    this.#shard.dispose()
    this.emit('gone')
  }

  #stepOfGradient(index: number, number: number): Step {
    return this.#steps.ofGradient(this.parameter(index), number, this.#history.imported !== undefined)
  }

  /** Computes and commits, or replays, one parameter's part of a step, once nothing is done between two steps. */
  #compute(whole: Whole, answer: Answer): void {
    const { held } = this.boundary
    if (held) void held.then(() => this.#computeNow(whole, answer))
    else this.#computeNow(whole, answer)
  }

  #computeNow(whole: Whole, answer: Answer): void {
    const { step, index, gradient, ticket, explain } = whole
    if (ticket.cancelled) return answer.resolve(undefined)
    try {
      // An import may have come since the gradient did.
      this.#stepOfGradient(index, step.number)
    } catch (error) {
      return answer.reject(error)
    }
    this.#work.begin()
    const refuse = (error: unknown) => {
      this.#work.end()
      answer.reject(error)
    }
    this.#shard.compute(step, index, whole, {
      resolve: (update) => {
        if (update) this.#journaling.store(step, index, gradient)
        this.#work.end()
        answer.resolve(update)
      },
      reject: (error) => (explain ? void explain(error).then(refuse, refuse) : refuse(error)),
    })
  }

  /** Finishes a step whose every parameter was applied or is skipped. With a journal the step is on the disk first. */
  #conclude(step: Step, waited: RunEvents['waited'][0]): Receipt | Promise<Receipt> {
    const { journal } = this.#journaling
    const durable = journal !== undefined
    const receipt = conclude(step, this.#shard, { digest: this.digest, durable })
    this.emit('waited', waited)
    if (!journal) return this.#finish(receipt)
    return this.#work.track(this.#commit(journal, receipt).then(() => this.#finish(receipt)))
  }

  #finish(receipt: Receipt): Receipt {
    const { current: step } = this.#steps
    const facts = measured(step, this.#shard, this.#history.finishedAt)
    this.#steps.finish()
    this.intake.finish()
    this.#history.add(receipt, facts)
    this.emit('receipt', receipt, facts, step)
    return receipt
  }

  async #commit(journal: Journal, receipt: Receipt): Promise<void> {
    const started = performance.now()
    await this.#journaling.commit(journal, receipt)
    this.emit('committed', (performance.now() - started) / 1000)
  }

  #algorithm(parameter: Parameter): string {
    return groupOf(parameter, this.groups).algorithm
  }
}
