import { createHash, randomBytes } from 'node:crypto'
import { tensorBytes } from '../../../kernels/dtype.js'
import type { TransportOffer } from '../../wire/frame.js'
import { makeMemory, type OwnMemory } from '../../wire/shared-memory.js'
import { layOut, PROOF_BYTES } from '../../wire/slots.js'
import type { Bound } from '../steps/parameter.js'

/**
 * Memory that the service may map: an arena for gradients and one for updates, each with a slot for every parameter.
 * The bytes stay what they are over any number of connections. Pages that nobody touches take no memory.
 */
export class Arenas {
  readonly #gradients: Arena
  readonly #updates: Arena
  #nonce = randomBytes(PROOF_BYTES)

  /** Throws an Error with the reason on systems without memfd. */
  constructor(parameters: readonly Bound[]) {
    this.#gradients = new Arena(parameters.map(({ size, gradient_dtype }) => tensorBytes(gradient_dtype, size)))
    try {
      this.#updates = new Arena(parameters.map(({ size, update_dtype }) => tensorBytes(update_dtype, size)))
      /* c8 ignore next 4 -- a system that has given one memfd lacks the second */
    } catch (error) {
      this.#gradients.memory.unmap()
      throw error
    }
  }

  /** What `open` says of them. Each connection has a nonce of its own. */
  offer(): TransportOffer {
    this.#nonce = randomBytes(PROOF_BYTES)
    const [gradients, updates] = [this.#gradients.memory, this.#updates.memory]
    gradients.view.set(this.#nonce)
    updates.view.fill(0, 0, PROOF_BYTES)
    const descriptors = [gradients.descriptor, updates.descriptor]
    return { kind: 'shm', nonce: this.#nonce, process: process.pid, descriptors }
  }

  /** Whether the service has answered the last nonce in memory: it sees the same bytes. */
  get isProved(): boolean {
    const answer = createHash('sha256').update(this.#nonce).digest()
    return answer.equals(this.#updates.memory.view.subarray(0, PROOF_BYTES))
  }

  /** The bytes of a gradient's slot, without a copy, to be written. */
  gradient(index: number): Uint8Array<ArrayBuffer> {
    return this.#gradients.slot(index)
  }

  /** The bytes of an update's slot, without a copy. */
  update(index: number): Uint8Array<ArrayBuffer> {
    return this.#updates.slot(index)
  }

  /** Gives the memory back. Views of it lead to zeros from then on. */
  close(): void {
    for (const { memory } of [this.#gradients, this.#updates]) memory.unmap()
  }
}

class Arena {
  readonly memory: OwnMemory
  readonly #sizes: readonly number[]
  readonly #offsets: readonly number[]

  constructor(sizes: readonly number[]) {
    const { offsets, bytes } = layOut(sizes)
    this.#sizes = sizes
    this.#offsets = offsets
    this.memory = makeMemory(bytes)
  }

  slot(index: number): Uint8Array<ArrayBuffer> {
    const offset = this.#offsets[index]
    return this.memory.view.subarray(offset, offset + this.#sizes[index])
  }
}
