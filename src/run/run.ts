import { EventEmitter } from 'node:events'
import type { Device, Ticket } from '../device/device.js'
import type { HostBlock, HostRange, JobResult } from '../device/job.js'
import type { Tensor } from '../device/memory.js'
import { aligned } from '../device/staging.js'
import { ServiceError } from '../errors.js'
import { planStep } from '../optimizer/algorithm.js'
import { effective } from '../optimizer/hyperparameters.js'
import { describe, type Parameter, stateBytes } from '../optimizer/parameter.js'
import type { Plan } from '../optimizer/plan.js'
import type { OpenedFrame, ReceiptFrame, StepSeconds } from '../wire/frame.js'
import { type DigestRecord, FIRST_DIGEST, nextDigest } from './digest.js'
import { type Groups, Schedule, type StepSettings, type StepValues } from './schedule.js'

/** The connection that writes to a run, as the run sees it. */
export type Writer = {
  /** Ends the connection with 4409; settles once nothing of the run's memory is being sent any more. */
  fence(): Promise<void>
  /** Ends the connection because its run is gone or its device has failed. */
  expel(error: ServiceError): void
}

/** One parameter's place in the run. `tensors` is undefined before its first step, when its state is all zeros. */
type Place = {
  parameter: Parameter
  tensors: Tensor[] | undefined
  /** How many updates were applied to it: torch's `step`. */
  count: number
  /** The run's step it was last applied for; 0 is never. */
  appliedStep: number
  record: DigestRecord | undefined
  gradientSquare: number
  /** Where its update of the step lies in the run's update block. */
  updateOffset: number
}

/** An update ready to be sent: `range` lies in the run's own memory and holds until the next step's update of that parameter. */
export type Update = {
  range: HostRange
  scale: number
  decay: number
  replayed: boolean
  gradient_norm: number
  update_rms: number
}

export type Receipt = ReceiptFrame
type Seconds = { -readonly [Phase in keyof StepSeconds]: number }

const NO_SECONDS: Seconds = { receive: 0, queue: 0, compute: 0, send: 0 }
const NAMES_IN_MESSAGE = 10

/**
 * One training run: its parameters' state, its step counter and its hyperparameters. The only writer of all of that.
 * State is immutable: a step computes new tensors, and a commit swaps the references.
 */
export class Run extends EventEmitter<{ receipt: [Receipt] }> {
  readonly name: string
  readonly created_at = new Date().toISOString()
  readonly admittedBytes: number
  epoch = 0
  /** The last finished step. */
  step = 0
  digest = FIRST_DIGEST
  schedule: Schedule
  writer: Writer | undefined
  #device: Device
  #places: Place[]
  #updates: HostBlock
  #receipts: Receipt[] = []
  #receiptsKept: number
  #seconds = { ...NO_SECONDS }
  #ticket: Ticket = { cancelled: false }
  #inFlight = new Set<Promise<unknown>>()

  constructor(device: Device, options: RunOptions) {
    super()
    this.name = options.name
    this.#device = device
    this.#receiptsKept = options.receipts_kept
    this.schedule = new Schedule(options.groups)
    let offset = 0
    this.#places = options.parameters.map((parameter) => {
      const place = newPlace(parameter, offset)
      offset += aligned(parameter.update_bytes)
      return place
    })
    this.admittedBytes = bytesOfRun(options.parameters)
    this.#updates = device.allocateHost(offset)
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

  /**
   * Makes `writer` the run's only writer. The jobs of the one before settle first: what they committed shows in `ahead`, and
   * the values that they computed with hold for the step; with nothing committed they are forgotten.
   */
  async attach(writer: Writer): Promise<void> {
    const older = this.writer
    this.writer = writer
    this.#ticket.cancelled = true
    await older?.fence()
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
      groups: effectiveGroups(this.schedule.current.groups),
    }
  }

  /** Takes a `step` frame: for the step in progress its values, for the last finished one nothing that differs. */
  setStep(step: number, values: StepValues): void {
    const next = this.step + 1
    if (step === next) return this.schedule.set(values, step)
    if (step === this.step && this.schedule.last) return this.schedule.confirm(this.schedule.last, values, step)
    throw this.#conflict(`a step frame for step ${step}`, step)
  }

  /** Checks that a gradient of `parameter` for `step` would be applied or replayed; throws STEP_CONFLICT otherwise. */
  expect(index: number, step: number): void {
    const place = this.#place(index)
    if (step === 0 || (step !== this.step + 1 && step !== place.appliedStep)) {
      throw this.#conflict(`a gradient of '${place.parameter.name}' for step ${step}`, step, index)
    }
    if (step === this.step + 1) this.schedule.begin()
  }

  /** Computes and commits, or replays, one parameter's step. Undefined: the connection that sent it has lost the run. */
  compute(index: number, step: number, gradient: HostRange): Promise<Update | undefined> {
    const work = this.#compute(index, step, gradient)
    const settled = work.catch(() => undefined).finally(() => this.#inFlight.delete(settled))
    this.#inFlight.add(settled)
    return work
  }

  /** Adds to the time that the step in progress (or a replay of the last one) spends in a phase. */
  spend(phase: keyof Seconds, seconds: number): void {
    this.#seconds[phase] += seconds
  }

  /** Finishes a step whose every parameter was applied or is skipped, or answers a finished one's receipt again. */
  end(step: number, skipped: readonly number[]): Receipt {
    const last = this.#receipts.at(-1)
    if (last && step === this.step) return { ...last, replayed: true }
    if (step !== this.step + 1) throw this.#conflict(`end for step ${step}`, step)
    this.#checkComplete(step, new Set(skipped))
    return this.#finish(step)
  }

  receipts(after: number): Receipt[] {
    return this.#receipts.filter((receipt) => receipt.step > after)
  }

  /** How many state bytes are live, and what a parameter's row in REST says. */
  get stateBytes(): number {
    return this.#places.reduce((sum, place) => sum + stateBytesOf(place), 0)
  }

  place(index: number): {
    parameter: Parameter
    algorithm: string
    step: number
    record: DigestRecord | undefined
    state_bytes: number
  } {
    const place = this.#place(index)
    const { parameter, count, record } = place
    return { parameter, algorithm: this.#algorithm(parameter), step: count, record, state_bytes: stateBytesOf(place) }
  }

  /** References to a parameter's state tensors; none before its first step. The caller releases them with `Device.memory`. */
  stateTensors(index: number): { name: string; shape: readonly number[]; tensor: Tensor }[] {
    const { parameter, tensors } = this.#place(index)
    return (tensors ?? []).map((tensor, i) => ({ ...parameter.state[i], tensor: this.#device.memory.retain(tensor) }))
  }

  /** Gives all memory back. The run has no writer and no job any more. */
  dispose(): void {
    for (const { tensors } of this.#places) for (const tensor of tensors ?? []) this.#device.memory.release(tensor)
    this.#device.freeHost(this.#updates)
    this.#device.dismiss(this.admittedBytes)
  }

  async #compute(index: number, step: number, gradient: HostRange): Promise<Update | undefined> {
    const place = this.#place(index)
    const replayed = place.appliedStep === step
    const settings = this.#settings(step)
    const plan = this.#plan(place, settings, replayed)
    const range = { block: this.#updates, offset: place.updateOffset, bytes: place.parameter.update_bytes }
    const ticket = this.#ticket
    const queuedAt = performance.now()
    const next: Tensor[] = []
    const release = () => {
      for (const tensor of next) this.#device.memory.release(tensor)
    }
    const job = () => {
      this.spend('queue', (performance.now() - queuedAt) / 1000)
      for (const { bytes } of place.parameter.state) next.push(this.#device.memory.allocate(bytes))
      return {
        plan,
        gradient,
        gradient_scale: settings.gradient_scale,
        state: place.tensors?.map((tensor) => tensor.pointer),
        next: next.map((tensor) => tensor.pointer),
        update: range,
        expected: replayed ? place.record?.gradientFingerprint : undefined,
      }
    }
    let result: JobResult | undefined
    try {
      result = await this.#device.run(job, ticket)
      if (result) this.#check(place, { step, result, settings, replayed })
    } catch (error) {
      release()
      throw error
    }
    if (!result) return undefined
    if (replayed) release()
    else this.#commit(place, { step, result, plan, next, gradient_scale: settings.gradient_scale })
    this.spend('compute', result.computeSeconds)
    return describeUpdate(place, { range, plan, result, replayed, gradient_scale: settings.gradient_scale })
  }

  #check(
    place: Place,
    {
      step,
      result,
      settings,
      replayed,
    }: { step: number; result: JobResult; settings: StepSettings; replayed: boolean },
  ): void {
    const { name, index } = place.parameter
    const where = { parameter: index, step }
    if (result.outcome === 'other_gradient') {
      throw new ServiceError(
        'STEP_CONFLICT',
        `parameter '${name}' was applied for step ${step} with another gradient`,
        { ...where, expected_step: this.step + 1 },
      )
    }
    if (result.outcome === 'not_finite') {
      const scaled = settings.gradient_scale === 1 ? '' : ` times gradient_scale ${settings.gradient_scale}`
      throw new ServiceError(
        'GRADIENT_NOT_FINITE',
        `the gradient of parameter '${name}' for step ${step}${scaled} holds NaN or Inf, or its update would`,
        where,
      )
    }
    if (replayed && result.updateFingerprint !== place.record?.updateFingerprint) {
      throw new Error(
        `the replay of parameter '${name}' for step ${step} is not the first answer: ${result.updateFingerprint} is not ${place.record?.updateFingerprint}`,
      )
    }
  }

  #commit(
    place: Place,
    made: { step: number; result: JobResult; plan: Plan; next: Tensor[]; gradient_scale: number },
  ): void {
    const { step, result, plan, next, gradient_scale } = made
    for (const tensor of place.tensors ?? []) this.#device.memory.release(tensor)
    place.tensors = next
    place.count += 1
    place.appliedStep = step
    place.gradientSquare = result.gradientSquare * gradient_scale ** 2
    const { gradientFingerprint, updateFingerprint } = result
    place.record = { gradient_scale, gradientFingerprint, updateFingerprint, scale: plan.scale, decay: plan.decay }
  }

  #checkComplete(step: number, skipped: Set<number>): void {
    for (const index of skipped) {
      if (this.#place(index).appliedStep !== step) continue
      throw this.#conflict(
        `parameter '${this.#place(index).parameter.name}' was applied, skipping it in step ${step}`,
        step,
        index,
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

  #finish(step: number): Receipt {
    const applied = this.#places.filter((place) => place.appliedStep === step)
    const records = this.#places.map((place) => (place.appliedStep === step ? place.record : undefined))
    this.step = step
    this.digest = nextDigest(this.digest, step, records)
    const receipt: Receipt = {
      type: 'receipt',
      step,
      replayed: false,
      applied: applied.length,
      skipped: this.#places.length - applied.length,
      gradient_norm: Math.sqrt(applied.reduce((sum, place) => sum + place.gradientSquare, 0)),
      groups: effectiveGroups(this.schedule.current.groups),
      clipped_heads: {},
      digest: this.digest,
      durable: false,
      seconds: this.#seconds,
    }
    this.#seconds = { ...NO_SECONDS }
    this.schedule.finish()
    this.#receipts.push(receipt)
    if (this.#receipts.length > this.#receiptsKept) this.#receipts.shift()
    this.emit('receipt', receipt)
    return receipt
  }

  #settings(step: number): StepSettings {
    return step === this.step && this.schedule.last ? this.schedule.last : this.schedule.current
  }

  #plan({ parameter, count }: Place, { groups }: StepSettings, replay: boolean): Plan {
    return planStep(parameter, groupOf(parameter, groups), { step: replay ? count : count + 1, replay })
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

  #conflict(what: string, step: number, parameter?: number): ServiceError {
    const expected_step = this.step + 1
    return new ServiceError(
      'STEP_CONFLICT',
      `${what}: run '${this.name}' has finished step ${this.step}, expected is step ${expected_step}`,
      { step, expected_step, ...(parameter === undefined ? {} : { parameter }) },
    )
  }
}

export type RunOptions = { name: string; groups: Groups; parameters: Parameter[]; receipts_kept: number }

/** Bytes of device and update memory that a run of these parameters takes: all state, and one step's updates. */
export function bytesOfRun(parameters: readonly Parameter[]): number {
  return parameters.reduce((sum, parameter) => sum + stateBytes(parameter) + aligned(parameter.update_bytes), 0)
}

export function groupOf(parameter: Parameter, groups: Groups) {
  const group = groups.get(parameter.group)
  if (group === undefined) throw new Error(`parameter '${parameter.name}' is in no group`)
  return group
}

function newPlace(parameter: Parameter, updateOffset: number): Place {
  return { parameter, tensors: undefined, count: 0, appliedStep: 0, record: undefined, gradientSquare: 0, updateOffset }
}

function stateBytesOf({ tensors }: Place): number {
  return (tensors ?? []).reduce((sum, tensor) => sum + tensor.bytes, 0)
}

function effectiveGroups(groups: Groups) {
  return Object.fromEntries([...groups].map(([name, group]) => [name, effective(group)]))
}

type Computed = { range: HostRange; plan: Plan; result: JobResult; replayed: boolean; gradient_scale: number }

function describeUpdate({ parameter }: Place, { range, plan, result, replayed, gradient_scale }: Computed): Update {
  return {
    range,
    replayed,
    scale: plan.scale,
    decay: plan.decay,
    gradient_norm: Math.sqrt(result.gradientSquare) * Math.abs(gradient_scale),
    update_rms: plan.rms_factor * Math.sqrt(result.updateSquare / parameter.elements),
  }
}
