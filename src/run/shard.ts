import type { Grant } from '../device/admission.js'
import type { Device, Ticket } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import type { RunStaging } from '../device/run-staging.js'
import { ServiceError } from '../errors.js'
import type { Attention } from '../optimizer/attention.js'
import { allStateBytes, type Parameter } from '../optimizer/parameter.js'
import { type Claims, claimsByParameter, rowScale } from '../optimizer/qk-clip.js'
import type { AppliedRecord, PlaceRecord } from '../store/checkpoint/manifest.js'
import type { StepRecord } from './digest.js'
import type { ImportedPlace } from './imported-state.js'
import { type Answer, type GradientPlaces, Place, type PlaceState } from './place.js'
import { Plans } from './plans.js'
import { appliedOf } from './record.js'
import type { Step } from './step/step.js'

/** `grant` is the memory that the device has admitted for the parameters. */
export type ShardOptions = {
  run: string
  parameters: readonly Parameter[]
  attentions: readonly Attention[]
  grant: Grant
}

/** A record of the digest, and the square of the gradient's norm, 0 where none was applied. */
export type MeasuredRecord = StepRecord & { readonly gradient_square: number }

/** The parameters of a run that this process computes: their places on one device. */
export class Shard {
  readonly grant: Grant
  /** Where gradients of these parameters are received. */
  readonly staging: RunStaging
  readonly attentions: readonly Attention[]
  readonly parameters: readonly Parameter[]
  /** Bytes of state that they have once every parameter has taken a step. */
  readonly fullStateBytes: number
  readonly #run: string
  readonly #device: Device
  readonly #places: readonly Place[]
  readonly #claims: Claims

  constructor(device: Device, { run: name, parameters, attentions, grant }: ShardOptions) {
    this.#run = name
    this.#device = device
    this.grant = grant
    this.staging = device.stagingOf(grant)
    this.parameters = parameters
    this.fullStateBytes = allStateBytes(parameters)
    this.attentions = attentions
    this.#claims = claimsByParameter(attentions)
    const run = {
      plans: new Plans(),
      rowScale: (parameter: Parameter, { settings }: Step) =>
        rowScale(parameter, this.#claims, settings.frame.max_logits),
    }
    this.#places = parameters.map((parameter, i) => new Place(device, run, { parameter, unit: grant.units[i] }))
  }

  get places(): readonly Place[] {
    return this.#places
  }

  /** Bytes of state that are live. */
  get stateBytes(): number {
    return this.#places.reduce((sum, place) => sum + place.stateBytes, 0)
  }

  /** The place at an index that a frame names. Throws PARAMETER_UNKNOWN. */
  place(index: number): Place {
    const place = this.#places[index]
    if (place !== undefined) return place
    const message = `run '${this.#run}' has ${this.#places.length} parameters, there is no index ${index}`
    throw new ServiceError('PARAMETER_UNKNOWN', message, { parameter: index })
  }

  /** Computes a parameter's part of a step, or computes it again. */
  compute(step: Step, index: number, asked: GradientPlaces & { ticket: Ticket }, answer: Answer): void {
    this.place(index).compute(step, asked, answer)
  }

  /** The places that a step has applied. */
  applied(step: Step): Place[] {
    return step.applied.map((index) => this.place(index))
  }

  /** The row scales of parameters that a step skips: QK-clip does not wait for a gradient. One at a time. */
  *skippedRowScales(step: Step): Generator<{ parameter: number; row_scale: Uint8Array }> {
    const { max_logits } = step.settings.frame
    for (const { parameter } of this.#places) {
      if (step.hasApplied(parameter.index)) continue
      const row_scale = rowScale(parameter, this.#claims, max_logits)
      if (row_scale) yield { parameter: parameter.index, row_scale }
    }
  }

  /** What each parameter adds to a step's digest. One at a time: the row scales of a large model are many bytes. */
  *records(step: Step): Generator<StepRecord> {
    const { max_logits } = step.settings.frame
    for (const { parameter, record } of this.#places) {
      const applied = step.hasApplied(parameter.index) ? record : undefined
      yield { applied, row_scale: rowScale(parameter, this.#claims, max_logits) }
    }
  }

  /** The same, each with the square of its gradient's norm. */
  *measuredRecords(step: Step): Generator<MeasuredRecord> {
    let index = 0
    for (const record of this.records(step)) {
      const { gradientSquare } = this.#places[index++]
      yield { ...record, gradient_square: record.applied ? gradientSquare : 0 }
    }
  }

  /** The state of every parameter, or what `imported` puts in its place. */
  states(imported?: readonly (ImportedPlace | undefined)[]): PlaceState[] {
    return this.#places.map(({ state }, i) => {
      const given = imported?.[i]
      return given ? { ...state, count: given.count, tensors: given.tensors } : state
    })
  }

  /** Goes on from state that no step of the run has made. A parameter without a place keeps its state. */
  takeOver(imported: readonly (ImportedPlace | undefined)[]): void {
    for (const [i, place] of this.#places.entries()) {
      const given = imported[i]
      if (given) place.takeOver(given.tensors.length > 0 ? given.tensors : undefined, given.count)
    }
  }

  /**
   * Takes over the state of a checkpoint: `tensors` has those of each parameter, undefined where it has none yet;
   * with `elsewhere` another kind of device computed the last step.
   */
  restore(
    records: readonly PlaceRecord[],
    { tensors, elsewhere }: { tensors: readonly (Tensor[] | undefined)[]; elsewhere: boolean },
  ): void {
    for (const [i, place] of this.#places.entries()) place.restore(records[i], tensors[i], elsewhere)
  }

  /** Holds a step that was computed again against what was acknowledged. Throws UnreadableError. */
  acknowledge(index: number, applied: AppliedRecord, elsewhere: boolean): void {
    this.place(index).acknowledge(appliedOf(applied), elsewhere)
  }

  /** Gives all memory back. No job is under way any more. */
  dispose(): void {
    for (const place of this.#places) place.dispose()
    this.staging.close()
    this.#device.dismiss(this.grant)
  }
}
