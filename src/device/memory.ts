import type { Pointer } from './onnx/onnxruntime.js'

/** A state tensor, immutable once its step was committed. It is shared, and lives as long as it has a reference. */
export type Tensor = { readonly unit: number; readonly pointer: Pointer; readonly bytes: number; references: number }

/** A source of memory: the host's allocator, or a GPU's. */
export type Allocator = { allocate(bytes: number): Pointer; free(pointer: Pointer): void }

type Block = { readonly pointer: Pointer; readonly bytes: number }

const POOLED_BLOCKS = 512

/** Keeps freed blocks for the next request of the same size, because fresh memory is expensive. */
class Pool {
  readonly #allocator: Allocator
  /** The block that was freed first is the first. */
  #kept: Block[] = []
  #bytes = 0
  readonly #largest: number

  constructor(allocator: Allocator, largest: number) {
    this.#allocator = allocator
    this.#largest = largest
  }

  /** A block of `bytes` bytes, not cleared. */
  take(bytes: number): Block {
    const at = this.#kept.findLastIndex((block) => block.bytes === bytes)
    if (at < 0) return { pointer: this.#allocate(bytes), bytes }
    this.#bytes -= bytes
    return this.#kept.splice(at, 1)[0]
  }

  give(block: Block): void {
    if (block.bytes > this.#largest) return this.#allocator.free(block.pointer)
    this.#kept.push(block)
    this.#bytes += block.bytes
    while (this.#bytes > this.#largest || this.#kept.length > POOLED_BLOCKS) this.#dropOldest()
  }

  /** Frees every block that is kept. */
  trim(): void {
    while (this.#kept.length > 0) this.#dropOldest()
  }

  // The blocks that are kept may be all memory that is left: without them the allocation is tried again.
  #allocate(bytes: number): Pointer {
    try {
      return this.#allocator.allocate(bytes)
    } catch (error) {
      if (this.#kept.length === 0) throw error
      this.trim()
      return this.#allocator.allocate(bytes)
    }
  }

  #dropOldest(): void {
    const [oldest] = this.#kept.splice(0, 1)
    this.#bytes -= oldest.bytes
    this.#allocator.free(oldest.pointer)
  }
}

/** The memory of state tensors, with counted references. */
export class StateMemory {
  /** Bytes of all live tensors; blocks that a pool keeps do not count. */
  bytes = 0
  readonly #pools: readonly Pool[]

  /** On each unit the pool keeps at most `pooledBytes`. */
  constructor(units: readonly { state: Allocator; pooledBytes: number }[]) {
    this.#pools = units.map(({ state, pooledBytes }) => new Pool(state, pooledBytes))
  }

  /** A tensor of `bytes` bytes on a unit, with one reference, not cleared. */
  allocate(bytes: number, unit = 0): Tensor {
    const { pointer } = this.#pools[unit].take(bytes)
    this.bytes += bytes
    return { unit, pointer, bytes, references: 1 }
  }

  retain(tensor: Tensor): Tensor {
    tensor.references += 1
    return tensor
  }

  release(tensor: Tensor): void {
    tensor.references -= 1
    if (tensor.references > 0) return
    this.bytes -= tensor.bytes
    this.#pools[tensor.unit].give(tensor)
  }

  /** Frees the memory that the pools keep, for when a run has gone. */
  trim(): void {
    for (const pool of this.#pools) pool.trim()
  }
}
