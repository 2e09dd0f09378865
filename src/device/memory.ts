import type { Pointer } from './onnx/onnxruntime.js'

/** A state tensor: immutable once a step was committed, and shared by reference (a reader keeps it alive). */
export type Tensor = { readonly unit: number; readonly pointer: Pointer; readonly bytes: number; references: number }

/** Where the memory comes from; for state on CUDA this is the device's allocator. */
export type Allocator = { allocate(bytes: number): Pointer; free(pointer: Pointer): void }

type Block = { readonly pointer: Pointer; readonly bytes: number }

const POOLED_BLOCKS = 512

/** Memory that was given back, for whoever asks for as many bytes next: fresh memory is the dearest thing. */
class Pool {
  readonly #allocator: Allocator
  /** The oldest first. */
  #kept: Block[] = []
  #bytes = 0
  readonly #largest: number

  constructor(allocator: Allocator, largest: number) {
    this.#allocator = allocator
    this.#largest = largest
  }

  /** `bytes` bytes; their contents are whatever was there. */
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

  /** Gives the memory back that nobody uses. */
  trim(): void {
    while (this.#kept.length > 0) this.#dropOldest()
  }

  // What is kept for the next one may be all that there is left.
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

/** Device memory of state tensors, with counted references. */
export class StateMemory {
  /** Bytes of all live tensors, without the pools. */
  bytes = 0
  readonly #pools: readonly Pool[]

  /** On every unit at most `pooledBytes` that nobody uses are kept for the next who asks. */
  constructor(units: readonly { state: Allocator; pooledBytes: number }[]) {
    this.#pools = units.map(({ state, pooledBytes }) => new Pool(state, pooledBytes))
  }

  /** A tensor of `bytes` on a unit with one reference; its contents are whatever was there. */
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

  /** Gives the pooled memory back, for when a run has gone. */
  trim(): void {
    for (const pool of this.#pools) pool.trim()
  }
}
