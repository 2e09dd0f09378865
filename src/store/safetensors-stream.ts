import { type Header, headerEnd, LENGTH_BYTES, parseHeader, SafetensorsError, type TensorRange } from './safetensors.js'

/** Takes the bytes of one tensor, piece by piece; the last piece ends it. A piece may cut an element. */
export type TensorSink = (piece: Uint8Array) => void

export type StreamReader = {
  /** Most bytes of the header. */
  headerBytes: number
  /** Bytes of the whole body, where its sender has said. */
  bytes?: number
  /** Is told what will come before any of it does, and answers who takes the bytes of a tensor. */
  opened(header: Header): (range: TensorRange) => TensorSink
}

/**
 * Reads a safetensors body as it comes; nothing of it is kept but the header. Throws SafetensorsError where it is not one, is cut
 * off or goes on behind its last tensor.
 */
export async function readStream(body: AsyncIterable<Uint8Array>, reader: StreamReader): Promise<void> {
  const { headerBytes, bytes = Number.MAX_SAFE_INTEGER } = reader
  const head = new Gathered()
  let tensors: Tensors | undefined
  for await (const piece of body) {
    if (tensors) {
      tensors.take(piece)
      continue
    }
    head.take(piece)
    const end = head.bytes < LENGTH_BYTES ? undefined : headerEnd(head.start(LENGTH_BYTES), bytes, headerBytes)
    if (end === undefined || head.bytes < end) continue
    const whole = head.start(head.bytes)
    const header = parseHeader(whole.subarray(LENGTH_BYTES, end), { start: end, bytes: reader.bytes })
    tensors = new Tensors(header.ranges, reader.opened(header), end)
    tensors.take(whole.subarray(end))
  }
  if (tensors) return tensors.end()
  throw new SafetensorsError(`the body ends after ${head.bytes} bytes, within its header`)
}

/** Pieces that are wanted as one. */
class Gathered {
  bytes = 0
  #pieces: Uint8Array[] = []

  take(piece: Uint8Array): void {
    this.#pieces.push(piece)
    this.bytes += piece.length
  }

  start(bytes: number): Uint8Array {
    const first = this.#pieces[0]
    if (first.length < bytes) this.#pieces = [Buffer.concat(this.#pieces)]
    return this.#pieces[0].subarray(0, bytes)
  }
}

/** Shares the bytes behind a header out to the tensors, which lie there in order and without holes. */
class Tensors {
  readonly #ranges: readonly TensorRange[]
  readonly #sinkOf: (range: TensorRange) => TensorSink
  readonly #last: number
  #next = 0
  #sink: TensorSink | undefined
  #at: number

  constructor(ranges: readonly TensorRange[], sinkOf: (range: TensorRange) => TensorSink, start: number) {
    this.#ranges = ranges
    this.#sinkOf = sinkOf
    this.#at = start
    this.#last = ranges.at(-1)?.end ?? start
  }

  take(piece: Uint8Array): void {
    let rest = piece
    while (rest.length > 0) {
      const range = this.#ranges[this.#next]
      if (range === undefined) {
        const bytes = this.#at + rest.length
        throw new SafetensorsError(`the body has ${bytes} bytes or more, its last tensor ends at ${this.#last}`)
      }
      this.#sink ??= this.#sinkOf(range)
      const part = rest.subarray(0, range.end - this.#at)
      this.#sink(part)
      this.#at += part.length
      rest = rest.subarray(part.length)
      if (this.#at < range.end) continue
      this.#sink = undefined
      this.#next += 1
    }
  }

  end(): void {
    if (this.#at === this.#last) return
    throw new SafetensorsError(`the body ends after ${this.#at} bytes, its last tensor ends at ${this.#last}`)
  }
}
