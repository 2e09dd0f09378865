/* c8 ignore start -- needs a GPU: npm run test:gpu */

import type { Scratch } from '../executor.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { aligned } from '../staging.js'
import type { Cuda } from './cuda.js'
import { ALIGNMENT } from './scratch.js'

const USES = ['gradients', 'updates', 'partials', 'products'] as const

/** The use of one part of the memory. */
type Use = (typeof USES)[number]

/** A lane's device memory: one allocation with a part for each use. It grows when a run is opened, never in a step. */
export class ScratchMemory {
  readonly #cuda: Cuda
  #memory: Pointer | undefined
  #sizes: Record<Use, number> = { gradients: 0, updates: 0, partials: 0, products: 0 }

  constructor(cuda: Cuda) {
    this.#cuda = cuda
  }

  /** Grows every part to `scratch` or more; `idle` waits until no work uses the memory. True where it has moved. */
  growTo(scratch: Scratch, idle: () => void): boolean {
    if (USES.every((name) => scratch[name] <= this.#sizes[name])) return false
    const sizes = { ...this.#sizes }
    for (const name of USES) sizes[name] = aligned(Math.max(scratch[name], sizes[name]), ALIGNMENT)
    // The new memory is allocated before the old is freed: if that fails, runs that are open go on in the old.
    const memory = this.#cuda.allocate(USES.reduce((sum, name) => sum + sizes[name], 0))
    idle()
    this.free()
    this.#memory = memory
    this.#sizes = sizes
    return true
  }

  start(use: Use): Pointer {
    if (this.#memory === undefined) throw new Error('no scratch memory was set aside')
    const before = USES.slice(0, USES.indexOf(use))
    return this.#memory + BigInt(before.reduce((sum, name) => sum + this.#sizes[name], 0))
  }

  bytes(use: Use): number {
    return this.#sizes[use]
  }

  /** Deals out the memory of every part anew, each from its start. */
  dealer(): (use: Use, bytes: number) => Pointer {
    const used: Record<Use, number> = { gradients: 0, updates: 0, partials: 0, products: 0 }
    return (use, bytes) => {
      const offset = used[use]
      used[use] += bytes
      if (used[use] <= this.#sizes[use]) return this.start(use) + BigInt(offset)
      throw new Error(`${use} need ${used[use]} bytes of scratch memory, ${this.#sizes[use]} are set aside`)
    }
  }

  free(): void {
    if (this.#memory !== undefined) this.#cuda.free(this.#memory)
    this.#memory = undefined
  }
}
/* c8 ignore stop */
