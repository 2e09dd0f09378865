import type { Grant } from '../device/admission.js'
import type { Device } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import type { ImportRecord } from '../store/checkpoint/manifest.js'

/**
 * One parameter's imported state: its count, and, unless that is 0, its state tensors with SHA-256 of each one's
 * bytes.
 */
export type ImportedPlace = { count: number; tensors: Tensor[]; hashes: string[] }

/** State that was received for a run. A parameter without a place keeps its own. Whoever has it last disposes of it. */
export class ImportedState {
  readonly places: (ImportedPlace | undefined)[]
  readonly #device: Device
  readonly #grant: Grant

  /** `grant` is the memory beside the run's own that its tensors take until the run has them. */
  constructor(device: Device, { grant, parameters }: { grant: Grant; parameters: number }) {
    this.#device = device
    this.#grant = grant
    this.places = new Array(parameters).fill(undefined)
  }

  /** The run has taken the tensors over: they are its own memory from now on. */
  taken(): void {
    for (const place of this.places) if (place) place.tensors = []
  }

  /** Gives back what no run has taken. */
  dispose(): void {
    for (const place of this.places) for (const tensor of place?.tensors ?? []) this.#device.memory.release(tensor)
    this.taken()
    this.#device.dismiss(this.#grant)
  }
}

/**
 * An import that a run has not gone over to yet: the state, the digest that the run will have, and the hashes that
 * this follows from.
 */
export type PendingImport = { state: ImportedState; digest: string; imported: ImportRecord }

/** The note of a run that goes on from an import. */
export function importNote(step: number): string {
  return `its state was imported after step ${step}`
}
