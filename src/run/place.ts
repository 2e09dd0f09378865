import assert from 'node:assert'
import { DTYPES, isBlockDtype } from '../../kernels/dtype.js'
import type { Device, Ticket } from '../device/device.js'
import type { Job, JobResult, Mean } from '../device/job.js'
import type { Tensor } from '../device/memory.js'
import type { Region } from '../device/region.js'
import { ServiceError } from '../errors.js'
import { groupOf } from '../optimizer/hyperparameters.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { Plan } from '../optimizer/plan.js'
import type { StateTensor } from '../optimizer/state.js'
import { type PlaceRecord, UnreadableError } from '../store/checkpoint/manifest.js'
import type { Contributor, DigestRecord } from './digest.js'
import type { Plans } from './plans.js'
import { appliedOf, appliedRecord, fingerprintText } from './record.js'
import type { Step } from './step/step.js'

/** What REST tells of a parameter; `record` is of the last step that was applied to it. */
export type PlaceRow = {
  parameter: Parameter
  algorithm: string
  count: number
  record: DigestRecord | undefined
  state_bytes: number
  last: LastStep | undefined
}

/**
 * L2 norm of the gradient that a parameter was last applied with, after gradient_scale, and root of the mean square of
 * its update's elements.
 */
export type LastStep = { gradient_norm: number; update_rms: number }

/**
 * An update ready to be sent from its memory, which is the caller's until it releases it. `row_scale` has the factor of
 * each row that QK-clip scales (float32 bytes); undefined where none is scaled.
 */
export type Update = {
  memory: Region
  scale: number
  decay: number
  row_scale: Uint8Array | undefined
  replayed: boolean
  gradient_norm: number
  update_rms: number
}

/**
 * Told what becomes of a gradient: exactly one of both is called, once, which may be before the call returns that asked
 * for it. `resolve` with undefined: it was not computed, because its ticket was cancelled before a lane began.
 */
export type Answer = {
  resolve(update: Update | undefined): void
  reject(error: unknown): void
}

/**
 * Where a gradient lies, and for one in memory that the client shares: `source` where it is to be copied from first.
 * `target` is where its update goes; left out, the device has memory for it.
 */
export type GradientPlaces = {
  gradient: Region
  source?: Region
  target?: () => Region
  /** What the gradient is the mean of, which is written there first; a gradient of a journal is there already. */
  mean?: Mean
  /** The replicas that the gradient, float32 then, is the mean of. */
  contributors?: readonly Contributor[]
}

/** An answer that is promised. */
export function answered(ask: (answer: Answer) => void): Promise<Update | undefined> {
  return new Promise((resolve, reject) => ask({ resolve, reject }))
}

/** A gradient to compute with, unless the ticket is cancelled before a lane begins. */
type Asked = GradientPlaces & { ticket: Ticket }

/** A gradient that waits for a lane, or is computed. */
type Asking = { readonly step: Step; readonly asked: Asked; readonly plan: Plan; readonly outputs: Outputs }

/** What a step, or an import, has left of a parameter. It does not change: the next step leaves another one. */
export type PlaceState = {
  /** How many updates were applied: torch's `step`. */
  readonly count: number
  /** The run's step that was applied last; 0 is never. */
  readonly appliedStep: number
  /** What that step came to. */
  readonly record: DigestRecord | undefined
  /** The sum of squares of that step's gradient. */
  readonly gradientSquare: number
  /** Root of the mean square of that step's update; left out where this process has not computed it. */
  readonly updateRms?: number
  /** Undefined before its first step, when all of it is zero. */
  readonly tensors: readonly Tensor[] | undefined
}

const UNTOUCHED: PlaceState = {
  count: 0,
  appliedStep: 0,
  record: undefined,
  gradientSquare: 0,
  tensors: undefined,
}

/** What a checkpoint says of a state beside its tensors. */
export function placeRecord({ count, appliedStep, gradientSquare, record }: PlaceState): PlaceRecord {
  const kept = { count, applied_step: appliedStep, gradient_square: gradientSquare }
  return record ? { ...kept, last: appliedRecord(record) } : kept
}

/** What a place has of its run: `plans` are those of all parameters, and QK-clip's factors for its rows in a step. */
export type PlaceRun = {
  readonly plans: Plans
  rowScale(parameter: Parameter, step: Step): Uint8Array | undefined
}

/** One parameter's place in a run: its state, and what it was last applied with. */
export class Place {
  readonly parameter: Parameter
  readonly unit: number
  #state = UNTOUCHED
  /** Whether another kind of device computed the last step: its update has other bits here. */
  #elsewhere = false
  readonly #device: Device
  readonly #run: PlaceRun

  /** `unit` of the device has its state and computes its steps. */
  constructor(device: Device, run: PlaceRun, { parameter, unit = 0 }: { parameter: Parameter; unit?: number }) {
    this.#device = device
    this.#run = run
    this.unit = unit
    this.parameter = parameter
  }

  get state(): PlaceState {
    return this.#state
  }

  get count(): number {
    return this.#state.count
  }

  get appliedStep(): number {
    return this.#state.appliedStep
  }

  get record(): DigestRecord | undefined {
    return this.#state.record
  }

  get gradientSquare(): number {
    return this.#state.gradientSquare
  }

  get updateRms(): number | undefined {
    return this.#state.updateRms
  }

  /** Undefined where this process has not computed the last step of the parameter. */
  get last(): LastStep | undefined {
    const { gradientSquare, updateRms } = this.#state
    return updateRms === undefined ? undefined : { gradient_norm: Math.sqrt(gradientSquare), update_rms: updateRms }
  }

  get stateBytes(): number {
    return (this.#state.tensors ?? []).reduce((sum, tensor) => sum + tensor.bytes, 0)
  }

  /** References to the state tensors, none before the first step. The caller releases them with `Device.memory`. */
  stateTensors(): (StateTensor & { tensor: Tensor })[] {
    return (this.#state.tensors ?? []).map((tensor, i) => ({
      ...this.parameter.state[i],
      tensor: this.#device.memory.retain(tensor),
    }))
  }

  /**
   * Takes over what a checkpoint has of it; the tensors, undefined where all are zero, are this place's from now on.
   */
  restore(kept: PlaceRecord, tensors: Tensor[] | undefined, elsewhere: boolean): void {
    const { count, applied_step: appliedStep, gradient_square: gradientSquare, last } = kept
    this.#replace({ count, appliedStep, gradientSquare, record: last && appliedOf(last), tensors })
    this.#elsewhere = elsewhere
  }

  /**
   * Takes over state that no step of this run has made; the tensors are this place's from now on, undefined where all
   * are zero. What the last step came to stays known, but cannot be computed again.
   */
  takeOver(tensors: Tensor[] | undefined, count: number): void {
    this.#replace({ ...this.#state, tensors, count })
  }

  /**
   * Holds the last step against what it came to when it was first computed; `elsewhere` that was on another kind of
   * device.
   */
  acknowledge(first: DigestRecord, elsewhere: boolean): void {
    const record = this.record
    assert(record, 'the step was computed again')
    const keys = elsewhere
      ? (['gradientFingerprint'] as const)
      : (['gradientFingerprint', 'updateFingerprint'] as const)
    const key = keys.find((name) => record[name] !== first[name])
    if (key !== undefined) {
      const [has, expected] = [record[key], first[key]].map(fingerprintText)
      const what = key === 'gradientFingerprint' ? 'gradient' : 'update'
      throw new UnreadableError(
        `the ${what} of parameter '${this.parameter.name}' has fingerprint ${has}, expected ${expected}`,
      )
    }
    this.#state = { ...this.#state, record: first }
    this.#elsewhere = elsewhere
  }

  /** Gives the state back. */
  dispose(): void {
    this.#replace({ ...this.#state, tensors: undefined })
  }

  /** Computes and commits this parameter's part of a step, or computes it again where the step has applied it. */
  compute(step: Step, asked: Asked, answer: Answer): void {
    const replay = step.hasApplied(this.parameter.index)
    const at = { step: replay ? this.count : this.count + 1, replay, isMean: asked.contributors !== undefined }
    const plan = this.#run.plans.of(this.parameter, groupOf(this.parameter, step.settings.groups), at)
    const asking = { step, asked, plan, outputs: new Outputs(this.#device, this.unit, asked.target) }
    const queuedAt = performance.now()
    const make = () => {
      step.spend('queue', (performance.now() - queuedAt) / 1000)
      return this.#job(asking)
    }
    const failed = (error: unknown) => {
      asking.outputs.release()
      answer.reject(this.#located(error, step))
    }
    const computed = (result: JobResult | undefined) => {
      if (result === undefined) return answer.resolve(undefined)
      let update: Update
      try {
        update = this.#take(asking, result)
      } catch (error) {
        return failed(error)
      }
      answer.resolve(update)
    }
    this.#device.enqueue({ ticket: asked.ticket, make, computed, failed }, this.unit)
  }

  #job({ step, asked, plan, outputs }: Asking): Job {
    const { gradient, source, mean, contributors } = asked
    const replayed = step.hasApplied(this.parameter.index)
    return {
      plan,
      source,
      mean,
      gradient_scale: step.settings.gradient_scale,
      state: this.#state.tensors?.map((tensor) => tensor.pointer),
      ...outputs.allocate(this.parameter, { gradient, isMean: contributors !== undefined }),
      expected: replayed ? this.record?.gradientFingerprint : undefined,
    }
  }

  /** Takes what a lane has computed: the next state is committed, or was committed before. */
  #take(asking: Asking, result: JobResult): Update {
    const { step, plan, outputs } = asking
    const replayed = step.hasApplied(this.parameter.index)
    this.#check(result, step)
    outputs.releaseFloats()
    if (replayed) outputs.releaseNext()
    else this.#commit(asking, result)
    step.spend('compute', result.computeSeconds)
    return {
      memory: outputs.update,
      replayed,
      scale: plan.scale,
      decay: plan.decay,
      row_scale: this.#run.rowScale(this.parameter, step),
      gradient_norm: Math.sqrt(result.gradientSquare) * Math.abs(step.settings.gradient_scale),
      update_rms: this.#rms(plan, result),
    }
  }

  // The device does not know whose memory it lacks.
  #located(error: unknown, { number: step }: Step): unknown {
    if (!(error instanceof ServiceError) || error.code !== 'OVER_CAPACITY') return error
    const { name, index } = this.parameter
    const message = `there is no memory for step ${step} of parameter '${name}': ${error.message}`
    return new ServiceError('OVER_CAPACITY', message, { parameter: index, step })
  }

  #check({ outcome, updateFingerprint }: JobResult, asked: Step): void {
    const { number: step, expected: expected_step, settings } = asked
    const { name, index } = this.parameter
    const where = { parameter: index, step }
    if (outcome === 'other_gradient') {
      const message = `parameter '${name}' was applied for step ${step} with another gradient`
      throw new ServiceError('STEP_CONFLICT', message, { ...where, expected_step })
    }
    if (outcome === 'not_finite') {
      const scaled = settings.gradient_scale === 1 ? '' : ` times gradient_scale ${settings.gradient_scale}`
      const message = `the gradient of parameter '${name}' for step ${step}${scaled} holds NaN or Inf, or its update would`
      throw new ServiceError('GRADIENT_NOT_FINITE', message, where)
    }
    const first = this.record?.updateFingerprint
    if (!asked.hasApplied(index) || this.#elsewhere || updateFingerprint === first) return
    throw new Error(
      `the replay of parameter '${name}' for step ${step} is not the first answer: ${updateFingerprint} is not ${first}`,
    )
  }

  #commit({ step, asked: { contributors }, plan, outputs }: Asking, result: JobResult): void {
    const { gradient_scale } = step.settings
    step.apply(this.parameter.index)
    const { gradientFingerprint, updateFingerprint } = result
    const { scale, decay } = plan
    const applied = { gradient_scale, gradientFingerprint, updateFingerprint, scale, decay }
    this.#replace({
      count: this.count + 1,
      appliedStep: step.number,
      record: contributors ? { ...applied, contributors } : applied,
      gradientSquare: result.gradientSquare * gradient_scale ** 2,
      updateRms: this.#rms(plan, result),
      tensors: outputs.next,
    })
    this.#elsewhere = false
  }

  #rms({ rms_factor }: Plan, { updateSquare }: JobResult): number {
    return rms_factor * Math.sqrt(updateSquare / this.parameter.elements)
  }

  #replace(state: PlaceState): void {
    for (const tensor of this.#state.tensors ?? []) this.#device.memory.release(tensor)
    this.#state = state
  }
}

/**
 * What a job writes into. It is taken when a lane is there for the job: what waits holds no memory but its
 * gradient's.
 */
class Outputs {
  next: Tensor[] = []
  readonly #device: Device
  readonly #unit: number
  readonly #target: (() => Region) | undefined
  /** Float32 of what travels in blocks, while a lane computes. */
  readonly #floats: Region[] = []
  #update: Region | undefined

  /** `target` is where the update goes; left out, the device has memory for it. */
  constructor(device: Device, unit: number, target?: () => Region) {
    this.#device = device
    this.#unit = unit
    this.#target = target
  }

  get update(): Region {
    assert(this.#update, 'a result has a job before it')
    return this.#update
  }

  /** A mean of replicas is float32, whatever they send. */
  allocate(
    parameter: Parameter,
    { gradient, isMean }: { gradient: Region; isMean: boolean },
  ): Pick<Job, 'gradient' | 'received' | 'next' | 'update' | 'sent'> {
    const { state, update_bytes, gradient_dtype, update_dtype } = parameter
    for (const { bytes } of state) this.next.push(this.#device.memory.allocate(bytes, this.#unit))
    this.#update = this.#target?.() ?? this.#device.takeUpdate(update_bytes)
    const received = isBlockDtype(gradient_dtype) && !isMean ? { span: gradient, dtype: gradient_dtype } : undefined
    const sent = isBlockDtype(update_dtype) ? { span: this.update, dtype: update_dtype } : undefined
    return {
      next: this.next.map((tensor) => tensor.pointer),
      ...(received ? { received, gradient: this.#float32(parameter) } : { gradient }),
      ...(sent ? { sent, update: this.#float32(parameter) } : { update: this.update }),
    }
  }

  #float32({ elements }: Parameter): Region {
    const region = this.#device.takeUpdate(elements * DTYPES.float32.bytes)
    this.#floats.push(region)
    return region
  }

  releaseFloats(): void {
    for (const region of this.#floats.splice(0)) region.release()
  }

  releaseNext(): void {
    for (const tensor of this.next) this.#device.memory.release(tensor)
  }

  release(): void {
    this.releaseNext()
    this.releaseFloats()
    this.#update?.release()
  }
}
