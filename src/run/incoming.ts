import { createHash, type Hash } from 'node:crypto'
import { setImmediate as turn } from 'node:timers/promises'
import type { Grant } from '../device/admission.js'
import type { Device } from '../device/device.js'
import type { Tensor } from '../device/memory.js'
import type { ImportRecord } from '../store/checkpoint/manifest.js'
import { importDigest } from './digest.js'
import type { Run } from './run.js'

/** What a parameter is to have: its count, and, unless that is 0, its state tensors with SHA-256 of each one's bytes. */
export type IncomingPlace = { count: number; tensors: Tensor[]; hashes: string[] }

/** State that was received for a run. A parameter without a place keeps what it has. Whoever has it last disposes of it. */
export class Incoming {
  readonly places: (IncomingPlace | undefined)[]
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

/** An import as the run will have it: the digest of its state, and what that follows from. */
export type Pending = { incoming: Incoming; digest: string; imported: ImportRecord }

/** What a run says that goes on from an import. */
export function importNote(step: number): string {
  return `its state was imported after step ${step}`
}

/** What the run's digest will be with `incoming`. The state that stays is read again, turn by turn of the event loop: nothing may move it. */
export async function pendingImport(device: Device, run: Run, incoming: Incoming): Promise<Pending> {
  const places: { hashes: readonly string[]; count: number }[] = []
  for (const [index, place] of incoming.places.entries()) {
    places.push(place ?? { hashes: await hashesOf(device, run, index), count: run.place(index).step })
  }
  const step_digest = run.stepDigest
  const imported = { step_digest, hashes: places.map(({ hashes }) => hashes) }
  return { incoming, digest: importDigest(step_digest, places), imported }
}

async function hashesOf(device: Device, run: Run, index: number): Promise<string[]> {
  const held = run.stateTensors(index)
  try {
    const hashes: Hash[] = held.map(() => createHash('sha256'))
    for (const [i, { tensor }] of held.entries()) {
      for (const piece of device.read(tensor)) {
        hashes[i].update(piece)
        await turn()
      }
    }
    return hashes.map((hash) => hash.digest('hex'))
  } finally {
    for (const { tensor } of held) device.memory.release(tensor)
  }
}
