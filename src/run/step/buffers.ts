import type { Grant } from '../../device/admission.js'
import type { Device } from '../../device/device.js'
import type { Region } from '../../device/region.js'
import { aligned } from '../../device/staging.js'
import type { Parameter } from '../../optimizer/parameter.js'

/**
 * The memory in which a run's members put their parts of every gradient together, and that of the updates which are
 * kept until all members have them. It is the run's own: no member's socket waits for another member's.
 */
export class Buffers {
  readonly #device: Device
  readonly #grant: Grant
  readonly #gradients: Arena
  readonly #updates: Arena
  /** The parameters whose memory for an update somebody has. */
  readonly #taken = new Set<number>()

  /** Throws OVER_CAPACITY with the bytes. The updates were admitted with the run. */
  constructor(device: Device, parameters: readonly Parameter[], run: string) {
    this.#device = device
    const gradients = parameters.map(({ gradient_bytes }) => gradient_bytes)
    this.#grant = device.reserveHost(bytesOf(gradients), `run '${run}' with members`)
    this.#gradients = new Arena(device, gradients)
    this.#updates = new Arena(
      device,
      parameters.map(({ update_bytes }) => update_bytes),
    )
  }

  /** The memory of a parameter's gradient. The caller releases it. */
  gradient(index: number): Region {
    return this.#gradients.slot(index)
  }

  /** Memory for a parameter's update: its own, or other memory while a slow reader has that. The caller releases it. */
  update(index: number): Region {
    const own = this.#updates.slot(index)
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

  /** Gives the memory back once nobody uses it any more. */
  close(): void {
    this.#gradients.close()
    this.#updates.close()
    this.#device.dismiss(this.#grant)
  }
}

/** One allocation with a slot for each parameter. The whole of it lives as long as a slot does. */
class Arena {
  readonly #whole: Region
  readonly #slots: readonly { offset: number; bytes: number }[]

  constructor(device: Device, sizes: readonly number[]) {
    let offset = 0
    this.#slots = sizes.map((bytes) => {
      const slot = { offset, bytes }
      offset += aligned(bytes)
      return slot
    })
    this.#whole = device.allocateHost(offset)
  }

  slot(index: number): Region {
    const { offset, bytes } = this.#slots[index]
    const whole = this.#whole.retain()
    return whole.carve(offset, bytes, () => whole.release())
  }

  close(): void {
    this.#whole.release()
  }
}

function bytesOf(sizes: readonly number[]): number {
  return sizes.reduce((sum, bytes) => sum + aligned(bytes), 0)
}
