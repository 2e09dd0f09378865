import type { Pointer } from './onnx/onnxruntime.js'

/** A state tensor, immutable once its step was committed. It is shared, and lives as long as it has a reference. */
export type Tensor = { readonly unit: number; readonly pointer: Pointer; readonly bytes: number; references: number }

/** A source of memory: the host's allocator, or a GPU's. */
export type Allocator = { allocate(bytes: number): Pointer; free(pointer: Pointer): void }

type Block = { readonly pointer: Pointer; readonly bytes: number }

const POOLED_BLOCKS = 512

/** Freed blocks, of which at most `limit` bytes are kept for the next request of the same size. */
class Shelf {
  #limit: number
  readonly #allocator: Allocator
  /** The block that was freed first is the first. */
  #kept: Block[] = []
  #bytes = 0

  constructor(allocator: Allocator, limit: number) {
    this.#allocator = allocator
    this.#limit = limit
  }

  get limit(): number {
    return this.#limit
  }

  set limit(bytes: number) {
    this.#limit = bytes
    this.#shrink()
  }

  get isEmpty(): boolean {
    return this.#kept.length === 0
  }

  /** A block of `bytes` bytes, not cleared; undefined where none is kept. */
  take(bytes: number): Block | undefined {
    const at = this.#kept.findLastIndex((block) => block.bytes === bytes)
    if (at < 0) return undefined
    this.#bytes -= bytes
    return this.#kept.splice(at, 1)[0]
  }

  give(block: Block): void {
    if (block.bytes > this.#limit) return this.#allocator.free(block.pointer)
    this.#kept.push(block)
    this.#bytes += block.bytes
    this.#shrink()
  }

  /** Frees every block that is kept. */
  trim(): void {
    while (!this.isEmpty) this.#dropOldest()
  }

  #shrink(): void {
    while (this.#bytes > this.#limit || this.#kept.length > POOLED_BLOCKS) this.#dropOldest()
  }

  #dropOldest(): void {
    const [oldest] = this.#kept.splice(0, 1)
    this.#bytes -= oldest.bytes
    this.#allocator.free(oldest.pointer)
  }
}

// All states of a parameter whose blocks are not large, at most three, fit beside those of a smaller one.
const LARGE_SHARE = 1 / 4

/**
 * Keeps freed blocks, because fresh memory is expensive: of small ones a fixed number of bytes, of large ones as many
 * bytes as the largest parameter has. So neither drives the other out.
 */
class Pool {
  readonly #allocator: Allocator
  readonly #small: Shelf
  readonly #large: Shelf

  /** Of small blocks at most `bytes` bytes are kept; a large one has more than a share of them. */
  constructor(allocator: Allocator, bytes: number) {
    this.#allocator = allocator
    this.#small = new Shelf(allocator, bytes)
    this.#large = new Shelf(allocator, 0)
  }

  /** The most bytes of large blocks that are kept. */
  set largest(bytes: number) {
    this.#large.limit = bytes
  }

  /** A block of `bytes` bytes, not cleared. */
  take(bytes: number): Block {
    return this.#shelf(bytes).take(bytes) ?? { pointer: this.#allocate(bytes), bytes }
  }

  give(block: Block): void {
    this.#shelf(block.bytes).give(block)
  }

  /** Frees every block that is kept. */
  trim(): void {
    this.#small.trim()
    this.#large.trim()
  }

  #shelf(bytes: number): Shelf {
    return bytes > this.#small.limit * LARGE_SHARE ? this.#large : this.#small
  }

  // The blocks that are kept may be all memory that is left: without them the allocation is tried again.
  #allocate(bytes: number): Pointer {
    try {
      return this.#allocator.allocate(bytes)
    } catch (error) {
      if (this.#small.isEmpty && this.#large.isEmpty) throw error
      this.trim()
      return this.#allocator.allocate(bytes)
    }
  }
}

/** The memory of state tensors, with counted references. */
export class StateMemory {
  /** Bytes of all live tensors; blocks that a pool keeps do not count. */
  bytes = 0
  readonly #pools: readonly Pool[]

  /** On each unit the pool keeps at most `pooledBytes` of small tensors, and of large ones what `keep` asks for. */
  constructor(units: readonly { state: Allocator; pooledBytes: number }[]) {
    this.#pools = units.map(({ state, pooledBytes }) => new Pool(state, pooledBytes))
  }

  /** Has each pool keep the state of the largest parameter, `largest` bytes: every step makes it anew. */
  keep(largest: number): void {
    for (const pool of this.#pools) pool.largest = largest
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
