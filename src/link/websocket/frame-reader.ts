import assert from 'node:assert'
import type { GradientHead } from '../../wire/codec.js'
import { recognize, rotated, UNDECIDED_BYTES } from './gradient-frame.js'

export type FrameReaderOptions = {
  /** Bytes of a message; 0: no limit. Longer ones are forwarded, to be refused. */
  maxPayload: number
  /** XORs `bytes` in place with the four bytes of `key`, over and over. */
  unmask: (bytes: Uint8Array, key: Uint8Array) => void
  /** Takes over ordinary bytes, in order; they are a copy of their own. */
  forward: (bytes: Buffer) => void
  destination: (head: GradientHead) => Uint8Array | undefined
  received: (head: GradientHead) => void
}

const SCRATCH_BYTES = 65_536
const READ_BYTES = 4 * 2 ** 20
// A rest below this is read together with what follows it, so that the next header costs no read of its own.
const BATCH_BYTES = 32_768

/** The payload of a gradient on its way. Without `target` it was abandoned and the rest is dropped. */
type Payload = { head: GradientHead; key: Uint8Array; target: Uint8Array | undefined; position: number; length: number }

/**
 * Cuts a stream of WebSocket frames into gradient payloads, which are read into their destinations, and the rest,
 * which is forwarded. Who reads the socket asks `next` for a buffer, fills it from its start, and says with `read`
 * how far.
 */
export class FrameReader {
  readonly #options: FrameReaderOptions
  readonly #scratch = Buffer.allocUnsafeSlow(SCRATCH_BYTES)
  /** Bytes at the start of the scratch about which nothing could be decided yet: fewer than UNDECIDED_BYTES. */
  #held = 0
  /** Bytes of the present ordinary frame that are still to come. */
  #ordinary = 0
  #payload: Payload | undefined
  /** Whether an ordinary message goes on in the next data frame. */
  #fragmented = false

  constructor(options: FrameReaderOptions) {
    this.#options = options
  }

  /** The buffer for the next read; good until `read`, `abandon` or `redirect`. */
  next(): Uint8Array {
    const { target, position } = this.#direct() ?? { target: this.#scratch, position: this.#held }
    return target.subarray(position, position + READ_BYTES)
  }

  /** `count` bytes lie in the buffer that `next` gave. */
  read(count: number): void {
    const payload = this.#direct()
    if (payload) this.#advance(payload, count)
    else this.#parse(this.#held + count)
  }

  /** Lets go of the destination at work, if there is one, and says whether there was: then `next` is another buffer. */
  abandon(): boolean {
    if (this.#payload?.target === undefined) return false
    this.#payload.target = undefined
    return true
  }

  /**
   * Has the destination at work, if there is one, go on in another place, to which what has come of it is copied; says
   * whether there was: then `next` is another buffer.
   */
  redirect(destination: (head: GradientHead) => Uint8Array): boolean {
    const payload = this.#payload
    if (payload?.target === undefined) return false
    const target = destination(payload.head)
    target.set(payload.target.subarray(0, payload.position))
    payload.target = target
    return true
  }

  #direct(): (Payload & { target: Uint8Array }) | undefined {
    const payload = this.#payload
    return payload && hasTarget(payload) && payload.length - payload.position >= BATCH_BYTES ? payload : undefined
  }

  /** Works through the first `end` bytes of the scratch and keeps what is undecided at its start. */
  #parse(end: number): void {
    let at = 0
    while (at < end) {
      const header = this.#payload || this.#ordinary > 0 ? 0 : this.#begin(this.#scratch.subarray(at, end))
      if (header === undefined) break
      at += header
      at += this.#consume(this.#scratch.subarray(at, end))
    }
    this.#scratch.copyWithin(0, at, end)
    this.#held = end - at
  }

  /**
   * Decides about the frame that begins here: how many bytes of it are done with, undefined if more are needed to
   * tell.
   */
  #begin(bytes: Buffer): number | undefined {
    const found = recognize(bytes.subarray(0, UNDECIDED_BYTES), this.#fragmented, this.#options.maxPayload)
    if (found.kind === 'more') return undefined
    const target = found.kind === 'gradient' ? this.#options.destination(found.head) : undefined
    if (found.kind === 'ordinary' || target === undefined) {
      this.#ordinary = found.kind === 'ordinary' ? found.length : found.end
      this.#fragmented = found.kind === 'ordinary' && found.fragmented
      return 0
    }
    const { head, key, start } = found
    assert.equal(target.length, head.dataLength, 'the destination is as long as the data')
    this.#payload = { head, key, target, position: 0, length: head.dataLength }
    return start
  }

  /** Forwards or places what of `bytes` belongs to the present frame, and returns how many. */
  #consume(bytes: Buffer): number {
    const payload = this.#payload
    if (payload === undefined) {
      const count = Math.min(this.#ordinary, bytes.length)
      this.#ordinary -= count
      this.#options.forward(Buffer.from(bytes.subarray(0, count)))
      return count
    }
    const count = Math.min(payload.length - payload.position, bytes.length)
    payload.target?.set(bytes.subarray(0, count), payload.position)
    this.#advance(payload, count)
    return count
  }

  /** `count` masked bytes lie at the payload's position. */
  #advance(payload: Payload, count: number): void {
    const { head, key, target, position } = payload
    const isMasked = key.some((byte) => byte !== 0)
    if (target && isMasked) this.#options.unmask(target.subarray(position, position + count), rotated(key, position))
    payload.position += count
    if (payload.position < payload.length) return
    this.#payload = undefined
    if (target) this.#options.received(head)
  }
}

function hasTarget(payload: Payload): payload is Payload & { target: Uint8Array } {
  return payload.target !== undefined
}
