import { elementsPerBlock, isDtype, tensorBytes, type WireDtype } from '../../kernels/dtype.js'

/** A contiguous part of a tensor, in bytes; `offset` counts from the tensor's first byte. */
export type Chunk = { readonly offset: number; readonly length: number }

/** Consecutive elements of a tensor in C order: from `start` on, up to and without `stop`. */
export type Range = readonly [start: number, stop: number]

/** Pieces of so many bytes travel alone, without a copy; shorter ones that follow each other share a frame. */
const ALONE_BYTES = 65_536
/** No element of a gradient or update has more. */
const ELEMENT_BYTES = 4

/** The elements of one tensor that a member of a run sends and receives, in order and without an overlap. */
export class Ranges {
  readonly elements: number
  /** The first element of each range; ranges that touch each other are one. */
  readonly #starts: number[] = []
  /** How many elements the ranges before each one have. */
  readonly #before: number[] = []

  /** `list` is sorted, without empty ranges and overlaps: `rangesProblem` says whether it is. */
  constructor(list: Iterable<Range>) {
    let elements = 0
    let end = -1
    for (const [start, stop] of list) {
      if (start !== end) {
        this.#starts.push(start)
        this.#before.push(elements)
      }
      elements += stop - start
      end = stop
    }
    this.elements = elements
  }

  static whole(elements: number): Ranges {
    return new Ranges([[0, elements]])
  }

  get count(): number {
    return this.#starts.length
  }

  /** The ranges, the first one first. */
  *list(): Generator<Range> {
    for (let i = 0; i < this.count; i++) yield this.#range(i)
  }

  equals(other: Ranges): boolean {
    const isSame = this.elements === other.elements && this.count === other.count
    return (
      isSame && this.#starts.every((start, i) => start === other.#starts[i] && this.#before[i] === other.#before[i])
    )
  }

  /** The first elements that both have; undefined where there are none. */
  overlap(other: Ranges): Range | undefined {
    for (let i = 0, j = 0; i < this.count && j < other.count; ) {
      const [one, two] = [this.#range(i), other.#range(j)]
      const [start, stop] = [Math.max(one[0], two[0]), Math.min(one[1], two[1])]
      if (start < stop) return [start, stop]
      if (one[1] <= two[1]) i += 1
      else j += 1
    }
    return undefined
  }

  /** The range that the element at a position lies in, with the position at which the range begins. */
  at(position: number): { range: Range; before: number } {
    let [low, high] = [0, this.count - 1]
    while (low < high) {
      const middle = Math.ceil((low + high) / 2)
      if (this.#before[middle] <= position) low = middle
      else high = middle - 1
    }
    return { range: this.#range(low), before: this.#before[low] ?? 0 }
  }

  #range(i: number): Range {
    const start = this.#starts[i] ?? 0
    return [start, start + (this.#before[i + 1] ?? this.elements) - (this.#before[i] ?? 0)]
  }
}

/** A tensor that ranges are of: how many elements it has, and as what its gradient and its update travel. */
export type Ranged = { readonly elements: number; readonly gradient_dtype: WireDtype; readonly update_dtype: WireDtype }

/** What is wrong with a list of ranges of a tensor, in words; undefined where nothing is. */
export function rangesProblem(
  list: readonly (readonly number[])[],
  { elements, gradient_dtype, update_dtype }: Ranged,
): string | undefined {
  // The longer block is a multiple of the shorter one.
  const block = Math.max(elementsPerBlock(gradient_dtype), elementsPerBlock(update_dtype))
  let end = 0
  for (const [i, range] of list.entries()) {
    const [start, stop] = range
    const shown = `ranges[${i}] is [${range}]`
    if (range.length !== 2 || start === undefined || stop === undefined) return `${shown}, expected [start, stop]`
    if (start >= stop) return `${shown}, expected a start below its stop: leave an empty range out`
    if (start < end) return `${shown}, expected a start of ${end} or more: ranges are sorted and do not overlap`
    if (stop > elements) return `${shown}, expected a stop of at most ${elements}, its elements`
    if (start % block > 0 || (stop % block > 0 && stop < elements))
      return `${shown}, expected multiples of ${block}: blocks of ${gradient_dtype} and ${update_dtype} are not cut`
    end = stop
  }
  return undefined
}

/** The bytes of ranges that begin where blocks do. */
function* inBlocks(dtype: WireDtype, ranges: Ranges): Generator<Range> {
  for (const [start, stop] of ranges.list()) yield [tensorBytes(dtype, start), tensorBytes(dtype, stop)]
}

/** A frame's worth of a tensor: `offset` is where its first byte lies, and `pieces` are where all of them do. */
export type Cut = Chunk & { readonly pieces: readonly Chunk[] }

/** The bytes of a tensor that a member sends or receives. A position counts them alone, an offset all of the tensor. */
export class Extent {
  readonly bytes: number
  readonly #ranges: Ranges
  readonly #unit: number

  /** `unit` is how many bytes an element has. */
  constructor(ranges: Ranges, unit: number) {
    this.bytes = ranges.elements * unit
    this.#ranges = ranges
    this.#unit = unit
  }

  /** What a member sends or receives of a tensor that travels as `dtype`. */
  static of(dtype: WireDtype, ranges: Ranges): Extent {
    if (isDtype(dtype)) return new Extent(ranges, tensorBytes(dtype, 1))
    return new Extent(new Ranges(inBlocks(dtype, ranges)), 1)
  }

  /** All of a tensor of so many bytes. */
  static whole(bytes: number): Extent {
    return new Extent(Ranges.whole(bytes), 1)
  }

  /** Where the byte at a position lies in the tensor; for the position behind the last one the end of its range. */
  offsetOf(position: number): number {
    const { offset } = this.#piece(position, 0)
    return offset
  }

  /** Where the bytes from a position on lie in the tensor, piece after piece. */
  *pieces(position: number, length: number): Generator<Chunk> {
    for (let done = 0; done < length; ) {
      const piece = this.#piece(position + done, length - done)
      yield piece
      done += piece.length
    }
  }

  /** Whether the bytes from a position on lie one behind the other in the tensor. */
  isContiguous(position: number, length: number): boolean {
    return this.#piece(position, length).length === length
  }

  /**
   * Cuts all of it into frames of at most `chunk_bytes`. No cut falls inside an element unless a frame has less room
   * than one.
   */
  *cuts(chunk_bytes: number): Generator<Cut> {
    const most = chunk_bytes < ELEMENT_BYTES ? chunk_bytes : chunk_bytes - (chunk_bytes % ELEMENT_BYTES)
    for (let position = 0; position < this.bytes; ) {
      const pieces: Chunk[] = []
      let length = 0
      for (const piece of this.pieces(position, Math.min(most, this.bytes - position))) {
        if (length > 0 && piece.length >= ALONE_BYTES) break
        pieces.push(piece)
        length += piece.length
        if (length >= ALONE_BYTES) break
      }
      yield { offset: pieces[0].offset, length, pieces }
      position += length
    }
  }

  /** What is left at a position of the range that it is in, and of `length`. */
  #piece(position: number, length: number): Chunk {
    const { range, before } = this.#ranges.at(Math.floor(position / this.#unit))
    const within = position - before * this.#unit
    const rest = (range[1] - range[0]) * this.#unit - within
    return { offset: range[0] * this.#unit + within, length: Math.min(length, rest) }
  }
}
