import { ServiceError } from '../errors.js'

/** A contiguous part of a tensor, in bytes; `offset` counts from the tensor's first byte. */
export type Chunk = { readonly offset: number; readonly length: number }

/** No element of a gradient or update has more. */
const ELEMENT_BYTES = 4

/**
 * Cuts a tensor of `bytes` bytes into consecutive chunks of at most `chunk_bytes`. No cut falls inside an element
 * unless a chunk has less room than one.
 */
export function* chunksOf(bytes: number, chunk_bytes: number): Generator<Chunk> {
  const most = chunk_bytes < ELEMENT_BYTES ? chunk_bytes : chunk_bytes - (chunk_bytes % ELEMENT_BYTES)
  for (let offset = 0; offset < bytes; offset += most) {
    yield { offset, length: Math.min(most, bytes - offset) }
  }
}

/**
 * Checks the chunks of one tensor as they are received: they must come in order, without a gap, an overlap or an empty
 * one. It counts bytes and holds none. `label` opens every error message and names the tensor.
 */
export class Assembly {
  readonly bytes: number
  readonly label: string
  #received = 0

  constructor(bytes: number, label: string) {
    this.bytes = bytes
    this.label = label
  }

  get received(): number {
    return this.#received
  }

  get complete(): boolean {
    return this.#received === this.bytes
  }

  /**
   * Accepts the next chunk, or throws and stays as it was.
   * @throws ServiceError FRAME_UNEXPECTED (empty, wrong offset), SHAPE_MISMATCH (more bytes than the tensor has)
   */
  accept({ offset, length }: Chunk): void {
    if (offset !== this.#received) {
      throw new ServiceError('FRAME_UNEXPECTED', `${this.label}: chunk at offset ${offset}, expected ${this.#received}`)
    }
    if (length === 0) throw new ServiceError('FRAME_UNEXPECTED', `${this.label}: empty chunk at offset ${offset}`)
    if (offset + length > this.bytes) {
      throw new ServiceError(
        'SHAPE_MISMATCH',
        `${this.label} has ${offset + length} bytes or more, expected ${this.bytes}`,
      )
    }
    this.#received += length
  }
}
