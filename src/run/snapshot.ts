import type { Device } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import { describe, type Parameter } from '../optimizer/parameter.js'
import type { StateTensor } from '../optimizer/state.js'
import type { PlaceRecord, RunRecord } from '../store/checkpoint/manifest.js'
import { type PlaceState, placeRecord } from './place.js'

/** A run without its lists, which are as long as the model has parameters. */
type Head = Omit<RunRecord, 'parameters' | 'places'>

/** A state tensor that is held for a reader, and whose it is. */
export type HeldTensor = StateTensor & { tensor: Tensor; parameter: Parameter; count: number }

/** All of a run between two steps: what a checkpoint says of it, and its state tensors, parameter after parameter. */
export type Described = { record: RunRecord; tensors: HeldTensor[] }

/**
 * A run between two steps, which the run has gone on from meanwhile. Its state is held until it is released. To take
 * one costs a reference for each tensor; what is to be said of each is found later, in slices.
 */
export class Snapshot {
  readonly head: Head
  /** Of each parameter in order. */
  readonly tensors: readonly Tensor[]
  readonly #device: Device
  readonly #parameters: readonly Parameter[]
  readonly #states: readonly PlaceState[]
  /** How many tensors were given back, from the first on. */
  #released = 0

  constructor(
    device: Device,
    { head, parameters, states }: { head: Head; parameters: readonly Parameter[]; states: readonly PlaceState[] },
  ) {
    this.head = head
    this.#device = device
    this.#parameters = parameters
    this.#states = states
    const tensors: Tensor[] = []
    for (const state of states) for (const tensor of state.tensors ?? []) tensors.push(device.memory.retain(tensor))
    this.tensors = tensors
  }

  /** Yields from time to time. */
  *describing(): Generator<undefined, Described> {
    const parameters: RunRecord['parameters'][number][] = []
    const places: PlaceRecord[] = []
    const tensors: HeldTensor[] = []
    for (const [i, parameter] of this.#parameters.entries()) {
      const state = this.#states[i]
      parameters.push(describe(parameter))
      places.push(placeRecord(state))
      const { count } = state
      for (let j = 0; j < (state.tensors?.length ?? 0); j++) {
        // Field by field: a spread takes half a second for 200,000 tensors.
        const { name, dtype, shape, bytes } = parameter.state[j]
        tensors.push({ name, dtype, shape, bytes, tensor: this.tensors[tensors.length], parameter, count })
      }
      yield
    }
    return { record: { ...this.head, parameters, places }, tensors }
  }

  /** Gives the first `count` tensors back that were not given back yet. */
  releaseFirst(count: number): void {
    for (; this.#released < count; this.#released++) this.#device.memory.release(this.tensors[this.#released])
  }

  /** Gives every tensor back that was not given back yet. */
  release(): void {
    this.releaseFirst(this.tensors.length)
  }
}
