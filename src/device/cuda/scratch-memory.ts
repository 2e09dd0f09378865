/* c8 ignore start -- needs a GPU: npm run test:gpu */

import type { Pointer } from '../onnx/onnxruntime.js'
import { aligned } from '../staging.js'
import type { Cuda } from './cuda.js'
import { ALIGNMENT, type Scratch } from './cuda-layout.js'

export type Region = 'gradients' | 'updates' | 'partials' | 'products'

const REGIONS = ['gradients', 'updates', 'partials', 'products'] as const

/** The device memory that a lane works in: one allocation with a region for each use. It grows when a run is opened, never in a step. */
export class ScratchMemory {
  readonly #cuda: Cuda
  #memory: Pointer | undefined
  #sizes: Record<Region, number> = { gradients: 0, updates: 0, partials: 0, products: 0 }

  constructor(cuda: Cuda) {
    this.#cuda = cuda
  }

  /** Makes every region at least so large; `idle` waits until nobody works in the memory. Answers whether it has moved. */
  growTo(scratch: Scratch, idle: () => void): boolean {
    if (REGIONS.every((name) => scratch[name] <= this.#sizes[name])) return false
    const sizes = { ...this.#sizes }
    for (const name of REGIONS) sizes[name] = aligned(Math.max(scratch[name], sizes[name]), ALIGNMENT)
    // Before the old memory goes: where there is no room, what runs already goes on in what it has.
    const memory = this.#cuda.allocate(REGIONS.reduce((sum, name) => sum + sizes[name], 0))
    idle()
    this.free()
    this.#memory = memory
    this.#sizes = sizes
    return true
  }

  start(region: Region): Pointer {
    if (this.#memory === undefined) throw new Error('no scratch memory was set aside')
    const before = REGIONS.slice(0, REGIONS.indexOf(region))
    return this.#memory + BigInt(before.reduce((sum, name) => sum + this.#sizes[name], 0))
  }

  bytes(region: Region): number {
    return this.#sizes[region]
  }

  /** Hands out the regions anew, each from its start. */
  dealer(): (region: Region, bytes: number) => Pointer {
    const used: Record<Region, number> = { gradients: 0, updates: 0, partials: 0, products: 0 }
    return (region, bytes) => {
      const offset = used[region]
      used[region] += bytes
      if (used[region] <= this.#sizes[region]) return this.start(region) + BigInt(offset)
      throw new Error(`${region} need ${used[region]} bytes of scratch memory, ${this.#sizes[region]} are set aside`)
    }
  }

  free(): void {
    if (this.#memory !== undefined) this.#cuda.free(this.#memory)
    this.#memory = undefined
  }
}
/* c8 ignore stop */
