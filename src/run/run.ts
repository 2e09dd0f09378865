import assert from 'node:assert'
import { EventEmitter } from 'node:events'
import type { Grant } from '../device/admission.js'
import type { Device, Ticket } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import type { Region } from '../device/region.js'
import { ServiceError } from '../errors.js'
import type { Attention } from '../optimizer/attention.js'
import { type Explanation, explain } from '../optimizer/explanation.js'
import { effective, type Groups, groupOf } from '../optimizer/hyperparameters.js'
import { describe, type Parameter } from '../optimizer/parameter.js'
import {
  type Claims,
  checkMaxLogits,
  claimsByParameter,
  clipSummary,
  type MaxLogits,
  rowScale,
} from '../optimizer/qk-clip.js'
import type { StateTensor } from '../optimizer/state.js'
import { type AppliedRecord, type RunRecord, UnreadableError } from '../store/checkpoint/manifest.js'
import type { Journal } from '../store/journal/journal.js'
import type { EndHead } from '../store/journal/journal-format.js'
import type { OpenedFrame, StepFrame, StepSeconds } from '../wire/frame.js'
import { Boundary } from './boundary.js'
import { type DigestRecord, nextDigest, type StepRecord } from './digest.js'
import { History, type Receipt } from './history.js'
import { importNote, type Pending } from './incoming.js'
import { Place, type Update } from './place.js'
import { appliedOf, appliedRecord, groupRecords, groupsOf, settingsOf, settingsRecord } from './record.js'
import { Schedule, type StepSettings } from './schedule.js'

/** The connection that writes to a run, as the run sees it. */
export type Writer = {
  /** Ends the connection with 4409: another one has the run. */
  fence(): void
  /** Ends the connection because its run is gone or its device has failed. */
  expel(error: ServiceError): void
}

/** An update with the factor of each row that QK-clip scales; undefined where none is. */
export type ScaledUpdate = Update & { row_scale: Uint8Array | undefined }

type Seconds = { -readonly [Phase in keyof StepSeconds]: number }

type PlaceRow = {
  parameter: Parameter
  algorithm: string
  step: number
  record: DigestRecord | undefined
  state_bytes: number
}

const NO_SECONDS: Seconds = { receive: 0, queue: 0, compute: 0, send: 0 }
const NAMES_IN_MESSAGE = 10

/**
 * One training run: its parameters' state, its step counter and its hyperparameters. The only writer of all of that.
 * State is immutable: a step computes new tensors, and a commit swaps the references.
 */
export class Run extends EventEmitter<{ receipt: [Receipt] }> {
  readonly name: string
  readonly created_at: string
  /** What the device has granted it, and where. */
  readonly grant: Grant
  epoch = 0
  /** Set where every step is on the disk before it is acknowledged. */
  journal: Journal | undefined
  /** What a client should know of how the run came here; empty where there is nothing. */
  note = ''
  readonly attentions: readonly Attention[]
  schedule: Schedule
  writer: Writer | undefined
  #claims: Claims
  #device: Device
  #places: Place[]
  readonly #history: History
  /** The places without a gradient in the last finished step. */
  #skipped: Place[] = []
  #seconds = { ...NO_SECONDS }
  #ticket: Ticket = { cancelled: false }
  /** Whether the step in progress is on its way to the disk. */
  #committing = false
  #inFlight = new Set<Promise<unknown>>()
  readonly boundary = new Boundary(this)
  /** Set while nothing may move the state: what would waits for it. */
  #hold: Promise<unknown> | undefined

  constructor(device: Device, options: RunOptions) {
    super()
    // Event streams and requests for checkpoints listen, and both are bounded where they begin.
    this.setMaxListeners(0)
    this.name = options.name
    this.created_at = options.created_at ?? new Date().toISOString()
    this.#device = device
    this.#history = new History(options.receipts_kept)
    this.schedule = new Schedule(options.groups)
    this.attentions = options.attentions
    this.#claims = claimsByParameter(options.attentions)
    this.#places = options.parameters.map((parameter, i) => new Place(device, parameter, options.grant.units[i]))
    this.grant = options.grant
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

  get parameters(): Parameter[] {
    return this.#places.map((place) => place.parameter)
  }

  /** The parameter at an index that a frame names. */
  parameter(index: number): Parameter {
    return this.#place(index).parameter
  }

  /** The indices that are applied for the step in progress already. */
  get ahead(): number[] {
    return this.#places.flatMap((place, index) => (place.appliedStep === this.step + 1 ? [index] : []))
  }

  /** Whether the step in progress is more than announced: it may have nothing but its end. */
  get begun(): boolean {
    return this.#committing || this.ahead.length > 0
  }

  /**
   * Makes `writer` the run's only writer. The jobs of the one before settle first: what they committed shows in `ahead`, and
   * the values that they computed with hold for the step; with nothing committed they are forgotten.
   */
  async attach(writer: Writer): Promise<void> {
    const older = this.writer
    this.writer = writer
    this.#ticket.cancelled = true
    older?.fence()
    await this.settled()
    if (this.ahead.length === 0) this.schedule.forget()
    this.#ticket = { cancelled: false }
    this.epoch += 1
  }

  /** The writer's connection is gone. Jobs that no lane has begun are dropped. */
  detach(writer: Writer): void {
    if (this.writer !== writer) return
    this.writer = undefined
    this.#ticket.cancelled = true
  }

  /** When every job of this run has been committed or dropped. */
  async settled(): Promise<void> {
    while (this.#inFlight.size > 0) await Promise.allSettled(this.#inFlight)
  }

  opened(resumed: boolean): Omit<OpenedFrame, 'type' | 'limits' | 'server'> {
    return {
      run: this.name,
      epoch: this.epoch,
      step: this.step,
      resumed,
      digest: this.digest,
      ahead: this.ahead,
      parameters: this.#places.map(({ parameter, appliedStep }) => ({
        ...describe(parameter),
        step: appliedStep,
        algorithm: this.#algorithm(parameter),
      })),
      attentions: this.attentions,
      groups: effectiveGroups(this.schedule.current.groups),
      ...(this.note && { note: this.note }),
    }
  }

  /** Takes a `step` frame: for the step in progress its values, for the last finished one nothing that differs. */
  setStep({ step, groups = {}, gradient_scale = 1, max_logits = {} }: StepFrame): void {
    const values = { groups, gradient_scale, max_logits: checkMaxLogits(this.attentions, max_logits, step) }
    const next = this.step + 1
    if (step === next) return this.schedule.set(values, step)
    if (step === this.step && this.schedule.last) return this.schedule.confirm(this.schedule.last, values, step)
    throw this.#conflict(`a step frame for step ${step}`, { step })
  }

  /** Checks that a gradient of `parameter` for `step` would be applied or replayed; throws STEP_CONFLICT otherwise. */
  expect(index: number, step: number): void {
    this.#checkExpected(index, step)
    if (step === this.step + 1) this.schedule.begin()
  }

  /**
   * Computes and commits, or replays, one parameter's step. Undefined: the connection that sent it has lost the run. The run
   * takes the gradient's region over, and releases it when the lane and the journal have read it, whatever comes of it.
   */
  async compute(index: number, step: number, gradient: Region): Promise<ScaledUpdate | undefined> {
    try {
      return await this.#apply(index, step, gradient)
    } finally {
      gradient.release()
    }
  }

  async #apply(index: number, step: number, gradient: Region): Promise<ScaledUpdate | undefined> {
    const place = this.#place(index)
    const ticket = this.#ticket
    if (this.#hold) await this.#hold
    if (ticket.cancelled) return undefined
    // An import may have come between its first chunk and its last.
    this.#checkExpected(index, step)
    const settings = this.#settings(step)
    const work = place.compute({
      step,
      expected_step: this.step + 1,
      settings,
      gradient,
      ticket,
      spend: (phase, seconds) => this.spend(phase, seconds),
    })
    const update = await this.#track(work)
    if (update === undefined) return undefined
    this.#store(place, step, gradient)
    return { ...update, row_scale: this.#rowScale(place, settings.frame.max_logits) }
  }

  /** The row scales of parameters that the last finished step skipped: QK-clip does not wait for a gradient. One at a time. */
  *skippedRowScales(): Generator<{ parameter: number; row_scale: Uint8Array }> {
    const { max_logits } = this.#settings(this.step).frame
    for (const place of this.#skipped) {
      const row_scale = this.#rowScale(place, max_logits)
      if (row_scale) yield { parameter: place.parameter.index, row_scale }
    }
  }

  /** Adds to the time that the step in progress (or a replay of the last one) spends in a phase. */
  spend(phase: keyof Seconds, seconds: number): void {
    this.#seconds[phase] += seconds
  }

  /**
   * Finishes a step whose every parameter was applied or is skipped, or answers a finished one's receipt again. With a journal
   * the step is on the disk first; where it cannot be, STORAGE_FAILED is thrown and the step is not finished.
   */
  async end(step: number, skipped: readonly number[]): Promise<Receipt> {
    if (this.#hold) await this.#hold
    const { last } = this.#history
    if (last && step === this.step) return { ...last, replayed: true }
    if (step !== this.step + 1) throw this.#conflict(`end for step ${step}`, { step })
    this.#checkComplete(step, new Set(skipped))
    const receipt = this.#conclude(step)
    if (!this.journal) return this.#finish(receipt)
    return this.#track(this.#commit(this.journal, receipt, skipped).then(() => this.#finish(receipt)))
  }

  receipts(after: number): Receipt[] {
    return this.#history.receipts(after)
  }

  /** Throws STEP_INCOMPLETE where a parameter was applied for the next step already. */
  checkBetween(what: string): void {
    const step = this.step + 1
    if (!this.begun) return
    throw new ServiceError('STEP_INCOMPLETE', `step ${step} of run '${this.name}' has begun, ${what}`, { step })
  }

  /** Does `work` between two steps: until it is done no gradient is computed and no step ends. Throws STEP_INCOMPLETE. */
  async between<T>(what: string, work: () => Promise<T>): Promise<T> {
    assert(this.#hold === undefined, 'one thing at a time is done between two steps')
    const working = this.settled().then(() => {
      this.checkBetween(what)
      return work()
    })
    this.#hold = Promise.allSettled([working])
    try {
      return await working
    } finally {
      this.#hold = undefined
    }
  }

  /**
   * All that a checkpoint is made of, as of the last finished step, or with an import after it; the caller releases the tensors.
   * No parameter may be applied for the next step yet.
   */
  snapshot(pending?: Pending): { record: RunRecord; tensors: Held[] } {
    assert(this.ahead.length === 0, 'a checkpoint is taken between two steps')
    const { last, before } = this.schedule
    const { step, previous, last: receipt } = this.#history
    const { digest, imported } = pending ?? this.#history
    const states = this.#places.map((place, i) => {
      const { count, tensors } = pending?.incoming.places[i] ?? place
      return { place, count, tensors }
    })
    const record: RunRecord = {
      ...{ run: this.name, created_at: this.created_at, epoch: this.epoch, step, digest, previous_digest: previous },
      parameters: this.parameters.map((parameter) => describe(parameter)),
      attentions: this.attentions,
      groups: groupRecords(before),
      ...(last && { last: settingsRecord(last) }),
      ...(receipt && { receipt }),
      places: states.map(({ place, count }) => ({ ...place.toRecord(), count })),
      ...(imported && { imported }),
    }
    const tensors = states.flatMap(({ place: { parameter }, count, tensors = [] }) =>
      tensors.map((tensor, i) => {
        return { ...parameter.state[i], tensor: this.#device.memory.retain(tensor), parameter, count }
      }),
    )
    return { record, tensors }
  }

  /** Goes on from state that was imported. Between two steps. */
  takeOver({ incoming, digest, imported }: Pending): void {
    for (const [i, place] of this.#places.entries()) {
      const given = incoming.places[i]
      if (given) place.takeOver(given.tensors.length > 0 ? given.tensors : undefined, given.count)
    }
    incoming.taken()
    this.#history.replace(digest, imported)
    this.note = importNote(this.step)
  }

  /**
   * Goes to where a checkpoint of this run is. `tensors` has those of each parameter, undefined where it has none yet; with
   * `elsewhere` another kind of device computed the last step.
   */
  restore(record: RunRecord, tensors: readonly (Tensor[] | undefined)[], elsewhere: boolean): void {
    const last = record.last && settingsOf(record.last)
    for (const [i, place] of this.#places.entries()) place.restore(record.places[i], tensors[i], elsewhere)
    this.#history.restore(record)
    this.schedule = new Schedule(groupsOf(record.groups), last)
    this.#skipped = this.#places.filter((place) => place.appliedStep !== record.step)
  }

  /** How many state bytes are live. */
  get stateBytes(): number {
    return this.#places.reduce((sum, place) => sum + place.stateBytes, 0)
  }

  /** What a parameter's row in REST says. */
  place(index: number): PlaceRow {
    const { parameter, count, record, stateBytes } = this.#place(index)
    return { parameter, algorithm: this.#algorithm(parameter), step: count, record, state_bytes: stateBytes }
  }

  /** What the step in progress is for a parameter. */
  explain(index: number): Explanation {
    const { parameter } = this.#place(index)
    return explain(parameter, groupOf(parameter, this.schedule.current.groups))
  }

  stateTensors(index: number): ReturnType<Place['stateTensors']> {
    return this.#place(index).stateTensors()
  }

  /** Gives all memory back. The run has no writer and no job any more. */
  dispose(): void {
    for (const place of this.#places) place.dispose()
    this.#device.dismiss(this.grant)
  }

  /**
   * A step of a journal, computed again: the gradient of a parameter was applied with this before. Throws UnreadableError where it
   * comes out otherwise, unless another kind of device had computed it.
   */
  acknowledge(index: number, applied: AppliedRecord, elsewhere: boolean): void {
    this.#place(index).acknowledge(appliedOf(applied), elsewhere)
  }

  /** Ends a step of a journal, which was acknowledged with this receipt. Throws UnreadableError where its digest is another one. */
  async endAgain({ step, skipped, digest, receipt }: EndHead): Promise<void> {
    const computed = await this.end(step, skipped)
    if (computed.digest !== digest)
      throw new UnreadableError(`step ${step} has digest ${computed.digest}, expected ${digest}`)
    this.#history.acknowledge(receipt)
  }

  #checkExpected(index: number, step: number): void {
    const place = this.#place(index)
    const replays = step === this.step && step === place.appliedStep
    if (step > 0 && (step === this.step + 1 || (replays && !this.#history.imported))) return
    const since = replays ? ', and its state was imported since' : ''
    throw this.#conflict(`a gradient of '${place.parameter.name}' for step ${step}`, { step, index, since })
  }

  #checkComplete(step: number, skipped: Set<number>): void {
    for (const index of skipped) {
      if (this.#place(index).appliedStep !== step) continue
      throw this.#conflict(
        `parameter '${this.#place(index).parameter.name}' was applied, skipping it in step ${step}`,
        { step, index },
      )
    }
    const missing = this.#places.filter(
      ({ appliedStep, parameter }) => appliedStep !== step && !skipped.has(parameter.index),
    )
    if (missing.length === 0) return
    const names = missing.slice(0, NAMES_IN_MESSAGE).map(({ parameter }) => `'${parameter.name}'`)
    const more = missing.length > names.length ? ` and ${missing.length - names.length} more` : ''
    throw new ServiceError(
      'STEP_INCOMPLETE',
      `step ${step} has neither a gradient nor a place in skipped for ${names.join(', ')}${more}`,
      { step },
    )
  }

  /** What the receipt of the step in progress says, now that it is complete. */
  #conclude(step: number): Receipt {
    const { max_logits } = this.schedule.current.frame
    const applied = this.#places.filter((place) => place.appliedStep === step)
    return {
      type: 'receipt',
      step,
      replayed: false,
      applied: applied.length,
      skipped: this.#places.length - applied.length,
      gradient_norm: Math.sqrt(applied.reduce((sum, place) => sum + place.gradientSquare, 0)),
      groups: effectiveGroups(this.schedule.current.groups),
      ...clipSummary(this.attentions, max_logits),
      digest: nextDigest(this.digest, step, this.#records(step, max_logits)),
      durable: this.journal !== undefined,
      seconds: this.#seconds,
    }
  }

  #finish(receipt: Receipt): Receipt {
    this.#seconds = { ...NO_SECONDS }
    this.#skipped = this.#places.filter((place) => place.appliedStep !== receipt.step)
    this.schedule.finish()
    this.#history.add(receipt)
    this.emit('receipt', receipt)
    return receipt
  }

  /** Has the journal take a gradient that it lacks: it was just applied, or is sent again because the disk was full. */
  #store({ parameter: { index }, record }: Place, step: number, gradient: Region): void {
    const { journal } = this
    if (journal === undefined || step !== this.step + 1 || journal.holds(index)) return
    assert(record, 'what was computed has a record')
    const kept = gradient.retain()
    void journal
      .append({ type: 'gradient', step, parameter: index, applied: appliedRecord(record) }, kept.view)
      .then(() => kept.release())
  }

  async #commit(journal: Journal, receipt: Receipt, skipped: readonly number[]): Promise<void> {
    const { step, digest } = receipt
    const applied = this.#places.filter((place) => place.appliedStep === step)
    const settings = settingsRecord(this.schedule.current)
    this.#committing = true
    await journal
      .commit(
        { type: 'end', step, digest, skipped, settings, receipt },
        applied.map(({ parameter }) => parameter.index),
      )
      .finally(() => {
        this.#committing = false
      })
  }

  #track<T>(work: Promise<T>): Promise<T> {
    const settled = work.catch(() => undefined).finally(() => this.#inFlight.delete(settled))
    this.#inFlight.add(settled)
    return work
  }

  /** One at a time: the row scales of a large model are many bytes. */
  *#records(step: number, max_logits: MaxLogits): Generator<StepRecord> {
    for (const place of this.#places) {
      const applied = place.appliedStep === step ? place.record : undefined
      yield { applied, row_scale: this.#rowScale(place, max_logits) }
    }
  }

  #rowScale({ parameter }: Place, max_logits: MaxLogits): Uint8Array | undefined {
    return rowScale(parameter, this.#claims, max_logits)
  }

  /** What holds for the last finished step or the one in progress. */
  #settings(step: number): StepSettings {
    return step === this.step && this.schedule.last ? this.schedule.last : this.schedule.current
  }

  #algorithm(parameter: Parameter): string {
    return groupOf(parameter, this.schedule.current.groups).algorithm
  }

  #place(index: number): Place {
    const place = this.#places[index]
    if (place === undefined) {
      throw new ServiceError(
        'PARAMETER_UNKNOWN',
        `run '${this.name}' has ${this.#places.length} parameters, there is no index ${index}`,
        { parameter: index },
      )
    }
    return place
  }

  #conflict(what: string, { step, index, since = '' }: { step: number; index?: number; since?: string }): ServiceError {
    const expected_step = this.step + 1
    return new ServiceError(
      'STEP_CONFLICT',
      `${what}: run '${this.name}' has finished step ${this.step}${since}, expected is step ${expected_step}`,
      { step, expected_step, ...(index === undefined ? {} : { parameter: index }) },
    )
  }
}

/** A state tensor that is held for a checkpoint, and whose it is. */
export type Held = StateTensor & { tensor: Tensor; parameter: Parameter; count: number }

/** `grant` is what the device has admitted: the run gives it back. */
export type RunOptions = {
  name: string
  created_at?: string
  groups: Groups
  parameters: Parameter[]
  attentions: readonly Attention[]
  grant: Grant
  receipts_kept: number
}

function effectiveGroups(groups: Groups) {
  return Object.fromEntries([...groups].map(([name, group]) => [name, effective(group)]))
}
