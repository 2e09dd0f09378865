import { ServiceError } from '../errors.js'
import { type Chunk, Extent } from './ranges.js'

/**
 * Cuts a tensor of `bytes` bytes into consecutive chunks of at most `chunk_bytes`. No cut falls inside an element
 * unless a chunk has less room than one.
 */
export function* chunksOf(bytes: number, chunk_bytes: number): Generator<Chunk> {
  for (const { offset, length } of Extent.whole(bytes).cuts(chunk_bytes)) yield { offset, length }
}

/**
 * Checks the chunks of one member's part of a tensor as they are received: they must come in order, without a gap, an
 * overlap or an empty one. It counts bytes and holds none. `label` opens every error message and names the tensor.
 */
export class Assembly {
  readonly extent: Extent
  readonly label: string
  #received = 0

  constructor(extent: Extent, label: string) {
    this.extent = extent
    this.label = label
  }

  /** How many bytes have come. */
  get received(): number {
    return this.#received
  }

  get complete(): boolean {
    return this.#received === this.extent.bytes
  }

  /** Whether these bytes are the next ones, and lie one behind the other in the tensor. */
  isNext({ offset, length }: Chunk): boolean {
    const fits = this.#received + length <= this.extent.bytes && offset === this.extent.offsetOf(this.#received)
    return fits && this.extent.isContiguous(this.#received, length)
  }

  /**
   * Accepts the next chunk, or throws and stays as it was. Answers where its bytes lie in the tensor.
   * @throws ServiceError FRAME_UNEXPECTED (empty, wrong offset), SHAPE_MISMATCH (more bytes than the part has)
   */
  accept({ offset, length }: Chunk): Iterable<Chunk> {
    const { extent, label } = this
    const position = this.#received
    const next = extent.offsetOf(position)
    if (offset !== next)
      throw new ServiceError('FRAME_UNEXPECTED', `${label}: chunk at offset ${offset}, expected ${next}`)
    if (length === 0) throw new ServiceError('FRAME_UNEXPECTED', `${label}: empty chunk at offset ${offset}`)
    if (position + length > extent.bytes) {
      const message = `${label} has ${position + length} bytes or more, expected ${extent.bytes}`
      throw new ServiceError('SHAPE_MISMATCH', message)
    }
    this.#received += length
    return extent.pieces(position, length)
  }
}
