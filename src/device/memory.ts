import type { Pointer } from './onnxruntime.js'

/** A state tensor: immutable once a step was committed, and shared by reference (a reader keeps it alive). */
export type Tensor = { readonly pointer: Pointer; readonly bytes: number; references: number }

/** Where the memory comes from; for state on CUDA this is the device's allocator. */
export type Allocator = { allocate(bytes: number): Pointer; free(pointer: Pointer): void }

type Block = { readonly pointer: Pointer; readonly bytes: number }

// Small tensors cost no allocation this way. Much more would be held for nothing: a pool must not keep an embedding.
const POOLED_BYTES = 64 << 20
const POOLED_BLOCKS = 64

/** Memory that was given back, for whoever asks for as many bytes next: fresh memory is the dearest thing. */
export class Pool {
  readonly #allocator: Allocator
  /** The oldest first. */
  #kept: Block[] = []
  #bytes = 0

  constructor(allocator: Allocator) {
    this.#allocator = allocator
  }

  /** `bytes` bytes; their contents are whatever was there. */
  take(bytes: number): Block {
    const at = this.#kept.findLastIndex((block) => block.bytes === bytes)
    if (at < 0) return { pointer: this.#allocator.allocate(bytes), bytes }
    this.#bytes -= bytes
    return this.#kept.splice(at, 1)[0]
  }

  give(block: Block): void {
    if (block.bytes > POOLED_BYTES) return this.#allocator.free(block.pointer)
    this.#kept.push(block)
    this.#bytes += block.bytes
    while (this.#bytes > POOLED_BYTES || this.#kept.length > POOLED_BLOCKS) this.#dropOldest()
  }

  /** Gives the memory back that nobody uses. */
  trim(): void {
    while (this.#kept.length > 0) this.#dropOldest()
  }

  #dropOldest(): void {
    const [oldest] = this.#kept.splice(0, 1)
    this.#bytes -= oldest.bytes
    this.#allocator.free(oldest.pointer)
  }
}

/** Device memory of state tensors, with counted references. */
export class StateMemory {
  /** Bytes of all live tensors, without the pool. */
  bytes = 0
  readonly #pool: Pool

  constructor(allocator: Allocator) {
    this.#pool = new Pool(allocator)
  }

  /** A tensor of `bytes` with one reference; its contents are whatever was there. */
  allocate(bytes: number): Tensor {
    const { pointer } = this.#pool.take(bytes)
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
    this.#pool.give(tensor)
  }

  /** Gives the pooled memory back, for when a run has gone. */
  trim(): void {
    this.#pool.trim()
  }
}
