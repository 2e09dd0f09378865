import assert from 'node:assert'
import type { Grant } from '../device/admission.js'
import type { Device } from '../device/device.js'
import type { Region } from '../device/region.js'
import type { RunStaging } from '../device/run-staging.js'
import { demandsOf } from '../keep/opening.js'
import { type CheckpointOnDisk, readTensors } from '../keep/restore.js'
import { rowScaleBytes } from '../optimizer/attention.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { Declaration } from '../run/declaration.js'
import { type Contributor, type DigestRecord, nextDigest } from '../run/digest.js'
import { answered, type Update } from '../run/place.js'
import { Shard } from '../run/shard.js'
import { inSlices } from '../run/slices.js'
import { meanDemands } from '../run/step/mean-demands.js'
import { Step, type StepSettings } from '../run/step/step.js'
import type { PlaceRecord } from '../store/checkpoint/manifest.js'
import type { Contribution } from '../wire/frame.js'

/**
 * Where a course begins: at a checkpoint, with the record that it has of each of the course's parameters. A parameter
 * without a record begins with no state, as in a new run. `means`: its gradients may be means of several replicas.
 */
export type Start = {
  name: string
  declaration: Declaration
  checkpoint: CheckpointOnDisk
  records: readonly (PlaceRecord | undefined)[]
  means: boolean
}

const UNTOUCHED: PlaceRecord = { count: 0, applied_step: 0, gradient_square: 0 }

/** Parameters on their way through the steps of a journal: the state that each step leaves is the next one's. */
export class Course {
  readonly #device: Device
  readonly #shard: Shard
  /** For gradients that are means of replicas. */
  #host: Grant | undefined
  #step: Step
  /** Of the last step that was ended. */
  #digest: string

  /** Throws OVER_CAPACITY, and UnreadableError where a file of the checkpoint does not have its hash. */
  static async start(device: Device, start: Start): Promise<Course> {
    const { name, declaration } = start
    const { parameters, attentions, groups } = declaration
    const scales = rowScaleBytes(attentions, parameters)
    const demands = await inSlices(demandsOf(parameters, { groups, scales, held: false }))
    const means = start.means ? meanDemands(parameters, groups) : []
    const shard = new Shard(device, { run: name, parameters, attentions, grant: device.admit(demands, name) })
    const course = new Course(device, shard, start)
    try {
      if (means.length > 0) course.#host = device.reserveHost(0, name, means)
      await device.load([...demands, ...means])
      await restore(device, shard, start)
      return course
    } catch (error) {
      course.dispose()
      throw error
    }
  }

  private constructor(device: Device, shard: Shard, { declaration, checkpoint }: Start) {
    const { step, digest } = checkpoint.manifest
    this.#device = device
    this.#shard = shard
    this.#step = new Step(step + 1, declaration.groups)
    this.#digest = digest
  }

  get parameters(): readonly Parameter[] {
    return this.#shard.parameters
  }

  get staging(): RunStaging {
    return this.#shard.staging
  }

  /** Fixes the values that the next step is computed with, and the replicas that it is the mean of. */
  begin(settings: StepSettings, contributors: readonly Contribution[]): void {
    this.#step.repeat(settings, contributors)
  }

  /** Computes a parameter's part of the step; the caller releases the update's memory, and the gradient. */
  async compute(index: number, gradient: Region, contributors: readonly Contributor[] | undefined): Promise<Update> {
    const ticket = { cancelled: false }
    const asked = { gradient, contributors, ticket }
    const update = await answered((answer) => this.#shard.compute(this.#step, index, asked, answer))
    assert(update, 'nobody cancels the ticket')
    return update
  }

  /** What the last computed step of a parameter came to. */
  record(index: number): DigestRecord | undefined {
    return this.#shard.place(index).record
  }

  /** Ends the step; answers its digest. */
  end(): string {
    this.#digest = nextDigest(this.#digest, this.#step.number, this.#shard.records(this.#step))
    this.#step = this.#step.finish()
    return this.#digest
  }

  /** Gives all memory back. Nothing is computed any more. */
  dispose(): void {
    this.#shard.dispose()
    if (this.#host) this.#device.dismiss(this.#host)
  }
}

async function restore(device: Device, shard: Shard, { checkpoint, records }: Start): Promise<void> {
  const places = shard.parameters.map((_, i) => records[i] ?? UNTOUCHED)
  const of = { ...checkpoint, manifest: { ...checkpoint.manifest, places } }
  const { parameters, grant } = shard
  shard.restore(places, {
    tensors: await readTensors(device, of, { parameters, units: grant.units }),
    elsewhere: false,
  })
}
