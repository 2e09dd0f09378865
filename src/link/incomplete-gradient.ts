import type { Region } from '../device/region.js'
import type { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { Receiver } from '../run/step/part.js'
import type { Assembly } from '../wire/chunks.js'
import type { Chunk } from '../wire/ranges.js'
import type { Gradient } from './answers.js'

/** A gradient that comes more slowly than this leaves the arena to others when they lack room there. */
const SLOW_BYTES_PER_SECOND = 2 ** 20
/** How long a rate is measured at least. */
const MEASURED_MS = 1000
// Copying this many bytes takes about a millisecond.
const COPY_BYTES = 4 << 20

/** Whose gradient it is, and of which step. */
export type Asked = Omit<Gradient, 'region' | 'ready' | 'repeated' | 'slot'>

/**
 * A member's part of a gradient of which some chunks have come, in memory for the whole tensor. A part that was applied
 * before is not stored: its bytes are held against those that lie there.
 */
export class IncompleteGradient {
  readonly assembly: Assembly
  /** When it got its memory, by performance.now(). */
  readonly startedAt = performance.now()
  readonly #of: Asked
  readonly #repeated: Receiver['repeated']
  #region: Region
  /** Settles when what came before the gradient has moved is in its new memory. */
  #ready: Promise<void> | undefined
  #measured = { bytes: 0, at: this.startedAt }

  /** Takes over `region`, which is as long as the gradient. `assembly` counts the bytes of the part. */
  constructor(of: Asked, { assembly, region, repeated }: Receiver & { assembly: Assembly }) {
    this.#of = of
    this.assembly = assembly
    this.#region = region
    this.#repeated = repeated
  }

  get region(): Region {
    return this.#region
  }

  get run(): Run {
    return this.#of.run
  }

  is(parameter: number, step: number): boolean {
    return this.#of.parameter === parameter && this.#of.step.number === step
  }

  /** Memory for the next chunk; undefined where it has to come the ordinary way. */
  destination(chunk: Chunk): Uint8Array | undefined {
    if (this.#repeated || !this.assembly.isNext(chunk)) return undefined
    return this.#region.chunk(chunk.offset, chunk.length)
  }

  /** Stores the bytes of a chunk in their pieces of the tensor. */
  store(pieces: Iterable<Chunk>, data: Uint8Array): void {
    let done = 0
    for (const { offset, length } of pieces) {
      const bytes = data.subarray(done, done + length)
      const place = this.#region.chunk(offset, length)
      if (this.#repeated) this.#repeated.differs ||= Buffer.compare(bytes, place) !== 0
      else place.set(bytes)
      done += length
    }
  }

  /**
   * Copies all of the part from a slot of memory that the client shares, where its elements lie one behind the other.
   * Answers false, with the rest left out, once the member is lost: whoever takes its place writes to the same memory.
   */
  *copying(slot: Region): Generator<undefined, boolean> {
    const { extent } = this.assembly
    for (let position = 0; position < extent.bytes; position += COPY_BYTES) {
      /* c8 ignore next -- the member is lost while a part of many megabytes is copied */
      if (this.#of.member.lost) return false
      const chunk = { offset: extent.offsetOf(position), length: Math.min(COPY_BYTES, extent.bytes - position) }
      this.store(this.assembly.accept(chunk), slot.chunk(position, chunk.length))
      yield
    }
    return true
  }

  /** The gradient, whose region is the caller's from now on. */
  complete(): Gradient {
    return { ...this.#of, region: this.#region, ready: this.#ready, repeated: this.#repeated }
  }

  /** Whether it came too slowly for the arena since this was last asked, and long enough ago to tell. */
  isSlow(now: number): boolean {
    const { received: bytes } = this.assembly
    const { at, bytes: before } = this.#measured
    if (now - at < MEASURED_MS) return false
    this.#measured = { bytes, at: now }
    return bytes - before < ((now - at) / 1000) * SLOW_BYTES_PER_SECOND
  }

  /** Goes on in `to`, and leaves the memory that it has once the chunks there are copied. */
  move(to: Region): void {
    const from = this.#region
    this.#region = to
    const copied = inSlices(moving(from, to.retain(), this.assembly.received))
    if (copied instanceof Promise) this.#ready = copied
  }
}

/** Copies in pieces, and releases both regions. */
function* moving(from: Region, to: Region, bytes: number): Generator<undefined, void> {
  for (let offset = 0; offset < bytes; offset += COPY_BYTES) {
    const length = Math.min(COPY_BYTES, bytes - offset)
    to.chunk(offset, length).set(from.chunk(offset, length))
    yield
  }
  from.release()
  to.release()
}
