import type { Device } from '../../device/device.js'
import type { Region } from '../../device/region.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { Update } from '../place.js'
import { Arena } from './buffers.js'

/** What came of a gradient that was applied: its update, which every member that has elements of it is sent. */
type Kept = { step: number; update: Update }

/** The newest update of each parameter of a run with members: it is kept until the next one is computed. */
export class Updates {
  readonly #device: Device
  readonly #arena: Arena
  readonly #kept = new Map<number, Kept>()
  /** The parameters whose memory somebody has. */
  readonly #taken = new Set<number>()

  /** The memory was admitted with the run. */
  constructor(device: Device, parameters: readonly Parameter[]) {
    this.#device = device
    this.#arena = new Arena(
      device,
      parameters.map(({ update_bytes }) => update_bytes),
    )
  }

  /** The update of a parameter for a step, where that is kept. It stays the keeper's. */
  of(index: number, step: number): Update | undefined {
    const kept = this.#kept.get(index)
    return kept?.step === step ? kept.update : undefined
  }

  /**
   * Memory for a parameter's next update, in place of the one that is kept: its own, or other memory while a slow
   * reader has that. The caller releases it, or has it kept.
   */
  take(index: number): Region {
    this.drop(index)
    const own = this.#arena.slot(index)
    if (!this.#taken.has(index)) {
      this.#taken.add(index)
      return own.carve(0, own.bytes, () => {
        this.#taken.delete(index)
        own.release()
      })
    }
    /* c8 ignore start -- a connection that was taken over has to have bytes left that its kernel does not take */
    const { bytes } = own
    own.release()
    return this.#device.takeUpdate(bytes)
  }
  /* c8 ignore stop */

  /** Keeps an update, whose memory is the keeper's from now on. */
  keep(index: number, step: number, update: Update): void {
    this.drop(index)
    this.#kept.set(index, { step, update })
  }

  /** Keeps the update of a parameter no longer. */
  drop(index: number): void {
    this.#kept.get(index)?.update.memory.release()
    this.#kept.delete(index)
  }

  /** The run is elsewhere in its history: what was applied before is none of it. */
  forget(): void {
    for (const index of [...this.#kept.keys()]) this.drop(index)
  }

  /** Gives the memory back once nobody uses it any more. */
  close(): void {
    this.forget()
    this.#arena.close()
  }
}
