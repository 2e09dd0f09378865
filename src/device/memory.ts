import type { Pointer } from './onnxruntime.js'

/** A state tensor: immutable once a step was committed, and shared by reference (a reader keeps it alive). */
export type Tensor = { readonly pointer: Pointer; readonly bytes: number; references: number }

/** Where the memory comes from; on CUDA this is the device's allocator. */
export type Allocator = { allocate(bytes: number): Pointer; free(pointer: Pointer): void }

// A step frees one buffer of a size about as often as it takes one, so a few of each size are enough. A large one is given
// back: the pool of an embedding alone would hold more than all that a service is allowed beside its state.
const POOLED_PER_SIZE = 4
const LARGEST_POOLED_BYTES = 32 << 20

/** Device memory of state tensors: counted references, and a small pool by size because fresh memory is the dearest thing. */
export class StateMemory {
  /** Bytes of all live tensors, without the pool. */
  bytes = 0
  #pool = new Map<number, Pointer[]>()
  readonly #allocator: Allocator

  constructor(allocator: Allocator) {
    this.#allocator = allocator
  }

  /** A tensor of `bytes` with one reference; its contents are whatever was there. */
  allocate(bytes: number): Tensor {
    const pointer = this.#pool.get(bytes)?.pop() ?? this.#allocator.allocate(bytes)
    this.bytes += bytes
    return { pointer, bytes, references: 1 }
  }

  retain(tensor: Tensor): Tensor {
    tensor.references += 1
    return tensor
  }

  release(tensor: Tensor): void {
    tensor.references -= 1
    if (tensor.references > 0) return
    this.bytes -= tensor.bytes
    const pooled = this.#pool.get(tensor.bytes) ?? []
    this.#pool.set(tensor.bytes, pooled)
    if (pooled.length < POOLED_PER_SIZE && tensor.bytes <= LARGEST_POOLED_BYTES) pooled.push(tensor.pointer)
    else this.#allocator.free(tensor.pointer)
  }

  /** Gives the pooled memory back, for when a run has gone. */
  trim(): void {
    for (const pointers of this.#pool.values()) for (const pointer of pointers) this.#allocator.free(pointer)
    this.#pool.clear()
  }
}
