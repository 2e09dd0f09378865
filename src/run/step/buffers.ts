import assert from 'node:assert'
import type { Grant } from '../../device/admission.js'
import type { Device } from '../../device/device.js'
import type { Demand } from '../../device/job.js'
import type { Region } from '../../device/region.js'
import { aligned } from '../../device/staging.js'
import type { Parameter } from '../../optimizer/parameter.js'

type Granted = { readonly grant: Grant; readonly arena: Arena }

/** The bytes of a float32 for each element of a parameter: the mean of replicas has no other type. */
const meanBytes = ({ elements }: Parameter) => elements * Float32Array.BYTES_PER_ELEMENT

/**
 * The memory in which a run's members put their parts of every gradient together: that of a whole step for each
 * replica, and with several of them for their mean. It is the run's own: no member's socket waits for another member's.
 */
export class Buffers {
  readonly #device: Device
  readonly #parameters: readonly Parameter[]
  readonly #what: string
  readonly #replicas: Granted[] = []
  #means: Granted | undefined

  /** `run` is the run's name, for messages. */
  constructor(device: Device, parameters: readonly Parameter[], run: string) {
    this.#device = device
    this.#parameters = parameters
    this.#what = `run '${run}' with members`
  }

  /**
   * Makes memory ready for so many replicas. Throws OVER_CAPACITY with the bytes, and has what it had then. `demands`
   * are those of the jobs whose gradients are means.
   */
  reserve(replicas: number, demands: readonly Demand[]): void {
    const before = this.#replicas.length
    try {
      while (this.#replicas.length < replicas) this.#replicas.push(this.#take(({ gradient_bytes }) => gradient_bytes))
      if (replicas > 1) this.#means ??= this.#take(meanBytes, demands)
    } catch (error) {
      this.trim(before)
      throw error
    }
  }

  /** Gives back what more replicas than these had. */
  trim(replicas: number): void {
    for (const granted of this.#replicas.splice(replicas)) this.#give(granted)
    if (replicas > 1 || !this.#means) return
    this.#give(this.#means)
    this.#means = undefined
  }

  /** The memory of a parameter's gradient, as a replica sends it. The caller releases it. */
  gradient(replica: number, index: number): Region {
    return this.#replicas[replica].arena.slot(index)
  }

  /** The memory of the mean of a parameter's gradients, of several replicas. The caller releases it. */
  mean(index: number): Region {
    assert(this.#means, 'one replica has no mean')
    return this.#means.arena.slot(index)
  }

  #take(bytesOf: (parameter: Parameter) => number, demands: readonly Demand[] = []): Granted {
    const sizes = this.#parameters.map(bytesOf)
    const bytes = sizes.reduce((sum, size) => sum + aligned(size), 0)
    const grant = this.#device.reserveHost(bytes, this.#what, demands)
    return { grant, arena: new Arena(this.#device, sizes) }
  }

  #give({ grant, arena }: Granted): void {
    arena.close()
    this.#device.dismiss(grant)
  }
}

/** One allocation with a slot for each parameter. The whole of it lives as long as a slot does. */
export class Arena {
  readonly #whole: Region
  readonly #slots: readonly { offset: number; bytes: number }[]

  /** `sizes` are the bytes of each parameter. */
  constructor(device: Device, sizes: readonly number[]) {
    let offset = 0
    this.#slots = sizes.map((bytes) => {
      const slot = { offset, bytes }
      offset += aligned(bytes)
      return slot
    })
    this.#whole = device.allocateHost(offset)
  }

  /** The memory of a parameter. The caller releases it. */
  slot(index: number): Region {
    const { offset, bytes } = this.#slots[index]
    const whole = this.#whole.retain()
    return whole.carve(offset, bytes, () => whole.release())
  }

  close(): void {
    this.#whole.release()
  }
}
