import { type Header, headerEnd, LENGTH_BYTES, parseHeader, SafetensorsError, type TensorRange } from './safetensors.js'

/** Takes the bytes of one tensor, piece by piece; the last piece ends it. A piece may cut an element. */
export type TensorSink = (piece: Uint8Array) => void

export type StreamReader = {
  /** Most bytes that the header may have. */
  headerBytes: number
  /** The bytes of the whole body, where its sender has said them. */
  bytes?: number
  /** Called with the header before any tensor's bytes; returns a function that gives the sink of each tensor. */
  opened(header: Header): (range: TensorRange) => TensorSink
}

/**
 * Reads a safetensors body as it comes, and keeps nothing of it but the header. Throws SafetensorsError where it is no
 * safetensors file, is cut off, or goes on behind its last tensor.
 */
export async function readStream(body: AsyncIterable<Uint8Array>, reader: StreamReader): Promise<void> {
  const pieces = body[Symbol.asyncIterator]()
  try {
    const { header, start, rest } = await readStreamHeader(pieces, reader)
    const tensors = new TensorSplitter({ header, start, sinkOf: reader.opened(header) })
    tensors.take(rest)
    for (let next = await pieces.next(); !next.done; next = await pieces.next()) tensors.take(next.value)
    tensors.end()
  } finally {
    await pieces.return?.()
  }
}

/**
 * Reads the header of a body. `start` is the byte at which the tensors begin, `rest` are the tensors' bytes that came
 * in the header's last piece. Throws SafetensorsError.
 */
export async function readStreamHeader(
  pieces: AsyncIterator<Uint8Array>,
  { headerBytes, bytes }: Pick<StreamReader, 'headerBytes' | 'bytes'>,
): Promise<{ header: Header; start: number; rest: Uint8Array }> {
  const prefix = await atLeast(pieces, new Uint8Array(0), LENGTH_BYTES)
  const start = headerEnd(prefix.subarray(0, LENGTH_BYTES), bytes ?? Number.MAX_SAFE_INTEGER, headerBytes)
  const head = await atLeast(pieces, prefix, start)
  return {
    header: parseHeader(head.subarray(LENGTH_BYTES, start), { start, bytes }),
    start,
    rest: head.subarray(start),
  }
}

/** `soFar` and further pieces, as many as make it at least `bytes` bytes. */
async function atLeast(pieces: AsyncIterator<Uint8Array>, soFar: Uint8Array, bytes: number): Promise<Uint8Array> {
  const gathered = [soFar]
  let has = soFar.length
  while (has < bytes) {
    const { done, value } = await pieces.next()
    if (done) throw new SafetensorsError(`the body ends after ${has} bytes, within its header`)
    gathered.push(value)
    has += value.length
  }
  return Buffer.concat(gathered)
}

/** Gives the bytes behind a header to the sinks of the tensors, which lie there in order and without holes. */
export class TensorSplitter {
  readonly #cutter: TensorCutter
  readonly #sinkOf: (range: TensorRange) => TensorSink
  #sink: TensorSink | undefined

  constructor({
    header,
    start,
    sinkOf,
  }: { header: Header; start: number; sinkOf: (range: TensorRange) => TensorSink }) {
    this.#cutter = new TensorCutter(header, start)
    this.#sinkOf = sinkOf
  }

  take(piece: Uint8Array): void {
    for (const { range, offset, bytes } of this.#cutter.cut(piece)) {
      if (offset === 0) this.#sink = this.#sinkOf(range)
      this.#sink?.(bytes)
    }
  }

  end(): void {
    this.#cutter.end()
  }
}

/** Some bytes of a tensor, `offset` bytes from its first. */
export type TensorPart = { range: TensorRange; offset: number; bytes: Uint8Array }

/** Cuts the bytes behind a header, as they come, into those of each tensor. */
export class TensorCutter {
  readonly #ranges: readonly TensorRange[]
  readonly #last: number
  #next = 0
  #at: number

  /** `start` is the byte at which the tensors begin. */
  constructor({ ranges }: Pick<Header, 'ranges'>, start: number) {
    this.#ranges = ranges
    this.#at = start
    this.#last = ranges.at(-1)?.end ?? start
  }

  /** The parts of a piece, to be taken one after the other. Throws SafetensorsError behind the last tensor. */
  *cut(piece: Uint8Array): Generator<TensorPart> {
    let rest = piece
    while (rest.length > 0) {
      const range = this.#ranges[this.#next]
      if (range === undefined) {
        const bytes = this.#at + rest.length
        throw new SafetensorsError(`the body has ${bytes} bytes or more, its last tensor ends at ${this.#last}`)
      }
      const offset = this.#at - range.begin
      const bytes = rest.subarray(0, range.end - this.#at)
      rest = rest.subarray(bytes.length)
      this.#at += bytes.length
      if (this.#at === range.end) this.#next += 1
      yield { range, offset, bytes }
    }
  }

  /** Throws SafetensorsError where bytes of a tensor have not come. */
  end(): void {
    if (this.#at === this.#last) return
    throw new SafetensorsError(`the body ends after ${this.#at} bytes, its last tensor ends at ${this.#last}`)
  }
}
