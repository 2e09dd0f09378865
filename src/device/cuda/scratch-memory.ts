/* c8 ignore start -- needs a GPU: npm run test:gpu */

import type { Scratch } from '../executor.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { aligned } from '../staging.js'
import type { Cuda } from './cuda.js'
import { ALIGNMENT } from './scratch.js'

const TENSORS = ['gradients', 'updates', 'partials'] as const
const USES = ['products', ...TENSORS] as const

type Tensors = (typeof TENSORS)[number]
type Use = (typeof USES)[number]

/**
 * A lane's device memory: one allocation. It grows when a run is opened, never in a step. Products have its start, and
 * the tensors of a group of jobs its end; what a group needs no tensors for, because its gradients and updates are on
 * the GPU, products have as well.
 */
export class ScratchMemory {
  readonly #cuda: Cuda
  #memory: Pointer | undefined
  #sizes: Record<Use, number> = { gradients: 0, updates: 0, partials: 0, products: 0 }
  /** Bytes of the tensors of the group of jobs at hand. */
  #tensors = 0

  constructor(cuda: Cuda) {
    this.#cuda = cuda
  }

  /** Grows every part to `scratch` or more; `idle` waits until no work uses the memory. True where it has moved. */
  growTo(scratch: Scratch, idle: () => void): boolean {
    if (USES.every((name) => scratch[name] <= this.#sizes[name])) return false
    const sizes = { ...this.#sizes }
    for (const name of USES) sizes[name] = aligned(Math.max(scratch[name], sizes[name]), ALIGNMENT)
    // The new memory is allocated before the old is freed: if that fails, runs that are open go on in the old.
    const memory = this.#cuda.allocate(totalOf(sizes))
    idle()
    this.free()
    this.#memory = memory
    this.#sizes = sizes
    this.#tensors = 0
    return true
  }

  /** The address of the memory for products, which stays the same until the memory moves. */
  get products(): Pointer {
    if (this.#memory === undefined) throw new Error('no scratch memory was set aside')
    return this.#memory
  }

  /** Bytes for products beside the tensors of the group at hand: at least what was set aside for them. */
  get room(): number {
    return totalOf(this.#sizes) - this.#tensors
  }

  /** Deals out the memory of the next group's tensors, from the end on; `bytes` are a multiple of ALIGNMENT. */
  tensors(): (use: Tensors, bytes: number) => Pointer {
    this.#tensors = 0
    const used: Record<Tensors, number> = { gradients: 0, updates: 0, partials: 0 }
    return (use, bytes) => {
      used[use] += bytes
      if (used[use] > this.#sizes[use]) throw tooSmall(use, used[use], this.#sizes[use])
      this.#tensors += bytes
      return this.products + BigInt(this.room)
    }
  }

  /** Deals out the memory of the next products, from the start on. */
  workspaces(): (bytes: number) => Pointer {
    let used = 0
    return (bytes) => {
      const offset = used
      used += bytes
      if (used > this.room) throw tooSmall('products', used, this.room)
      return this.products + BigInt(offset)
    }
  }

  /** The address of one tensor in a part that no group of jobs shares with products. */
  part(use: Use, bytes = this.bytes(use)): Pointer {
    if (bytes > this.bytes(use)) throw tooSmall(use, bytes, this.bytes(use))
    const before = USES.slice(0, USES.indexOf(use))
    return this.products + BigInt(before.reduce((sum, name) => sum + this.#sizes[name], 0))
  }

  bytes(use: Use): number {
    return this.#sizes[use]
  }

  free(): void {
    if (this.#memory !== undefined) this.#cuda.free(this.#memory)
    this.#memory = undefined
  }
}

function totalOf(sizes: Record<Use, number>): number {
  return USES.reduce((sum, name) => sum + sizes[name], 0)
}

function tooSmall(use: Use, needed: number, set: number): Error {
  return new Error(`${use} need ${needed} bytes of scratch memory, ${set} are set aside`)
}
/* c8 ignore stop */
