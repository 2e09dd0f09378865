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
  /** Told of a ping or pong of `bytes` bytes that needs no answer. */
  skipped: (bytes: number) => void
  /** Told of a fragment that is small. */
  small: () => void
  /**
   * Whether an ordinary message of so many bytes, of which the first are here, may be read. Where it may not, reading
   * is paused, and `goOn` asks again.
   */
  admit: (bytes: number) => boolean
  /** Whether nothing more may be read at present: the rest waits for `goOn`. */
  paused: () => boolean
}

const SCRATCH_BYTES = 65_536
const READ_BYTES = 4 * 2 ** 20
// A rest below this is read together with what follows it, so that the next header costs no read of its own.
const BATCH_BYTES = 32_768
/** An ordinary message of no more bytes is read without being asked for: it is here in one or two reads. */
export const FREE_BYTES = 65_536
// A fragment is a Buffer of its own, which takes so much beside its bytes.
const FRAGMENT_BYTES = 1024

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
  /**
   * Bytes at the start of the scratch about which nothing could be decided yet, fewer than UNDECIDED_BYTES, or that
   * wait for `goOn`.
   */
  #held = 0
  /** Where the ordinary bytes of the scratch begin that were not forwarded yet. */
  #from = 0
  /** Bytes of the present ordinary frame that are still to come. */
  #ordinary = 0
  #payload: Payload | undefined
  /** Whether an ordinary message goes on in the next data frame. */
  #fragmented = false
  /** What the fragments of the present message take that have come so far. */
  #fragments = 0
  /** The last ping of those that have come one behind the other. */
  #ping: Buffer | undefined
  /** Whether bytes were left because reading is paused. */
  #waits = false

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

  /**
   * Works through what was left when reading was paused, and says whether there was something: `next` is another buffer
   * then.
   */
  goOn(): boolean {
    if (!this.#waits) return false
    this.#parse(this.#held)
    return true
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

  /**
   * Works through the first `end` bytes of the scratch and keeps what is undecided at its start, or what is left once
   * reading is paused.
   */
  #parse(end: number): void {
    let at = 0
    let stopped = false
    this.#from = 0
    this.#waits = false
    while (at < end && !stopped) {
      if (!this.#payload && this.#ordinary === 0) {
        const done = this.#begin(at, end)
        stopped = done === 'waits'
        if (done === 'more' || done === 'waits') break
        at += done
      }
      at += this.#consume(at, end)
      stopped = !this.#payload && this.#ordinary === 0 && this.#options.paused()
    }
    this.#forward(at)
    this.#forwardPing()
    this.#scratch.copyWithin(0, at, end)
    this.#held = end - at
    if (stopped) this.#stop()
  }

  /** Waits for `goOn`, unless what was forwarded last has ended the pause already. */
  #stop(): void {
    if (this.#options.paused()) this.#waits = true
    else this.#parse(this.#held)
  }

  /**
   * Decides about the frame that begins at `at`: how many bytes of it are done with, 'more' if more are needed to
   * tell, 'waits' if it may not be read yet.
   */
  #begin(at: number, end: number): number | 'more' | 'waits' {
    const bytes = this.#scratch.subarray(at, Math.min(end, at + UNDECIDED_BYTES))
    const found = recognize(bytes, this.#fragmented, this.#options.maxPayload)
    if (found.kind === 'more') return 'more'
    if (found.kind === 'control') return this.#control(at, found)
    this.#forwardPing()
    const target = found.kind === 'gradient' ? this.#destination(at, found.head) : undefined
    if (found.kind === 'ordinary' || target === undefined) {
      const frame = found.kind === 'ordinary' ? found : { length: found.end, fragmented: false, isSmall: false }
      return this.#ordinaryFrame(at, frame)
    }
    const { head, key, start } = found
    assert.equal(target.length, head.dataLength, 'the destination is as long as the data')
    this.#payload = { head, key, target, position: 0, length: head.dataLength }
    return start
  }

  #ordinaryFrame(at: number, frame: { length: number; fragmented: boolean; isSmall: boolean }): 0 | 'waits' {
    const { length, fragmented, isSmall } = frame
    const isWhole = !this.#fragmented && !fragmented
    const fragments = isWhole ? 0 : this.#fragments + length + FRAGMENT_BYTES
    if (!this.#mayRead(at, isWhole ? length : fragments, isWhole)) return 'waits'
    this.#fragments = fragmented ? fragments : 0
    this.#ordinary = length
    this.#fragmented = fragmented
    if (isSmall) this.#options.small()
    return 0
  }

  /**
   * Whether the message may be read that goes on, or begins, with the frame at `at`: with it, it takes `bytes` bytes.
   * How many it will take is known of a whole one alone. ws refuses what is too long by its header.
   */
  #mayRead(at: number, bytes: number, isWhole: boolean): boolean {
    const { maxPayload, admit, paused } = this.#options
    if (bytes <= FREE_BYTES || (maxPayload > 0 && bytes > maxPayload + 14)) return true
    // What the messages before it have room for is given back once they are handled.
    this.#forward(at)
    return !paused() && admit(isWhole ? bytes : Math.max(bytes, maxPayload))
  }

  /** Where the gradient that begins at `at` goes, which depends on the messages before it. */
  #destination(at: number, head: GradientHead): Uint8Array | undefined {
    this.#forward(at)
    return this.#options.destination(head)
  }

  /**
   * Of pings that come together the last one alone needs an answer, and a pong needs none (RFC 6455, section 5.5.3).
   * They are the smallest frames that there are: to forward each would take a hundred milliseconds for one read.
   */
  #control(at: number, { length, isPing }: { length: number; isPing: boolean }): number {
    this.#forward(at)
    const frame = this.#scratch.subarray(at, at + length)
    const superfluous = isPing ? this.#ping : frame
    if (superfluous) this.#options.skipped(superfluous.length)
    if (isPing) this.#ping = frame
    this.#from = at + length
    return length
  }

  /** Forwards the ordinary bytes before `at` that were not forwarded yet, of however many frames they are. */
  #forward(at: number): void {
    if (at > this.#from) this.#options.forward(Buffer.from(this.#scratch.subarray(this.#from, at)))
    this.#from = at
  }

  #forwardPing(): void {
    if (this.#ping === undefined) return
    this.#options.forward(Buffer.from(this.#ping))
    this.#ping = undefined
  }

  /** Goes over the bytes from `at` on that belong to the present frame, places them, and returns how many there are. */
  #consume(at: number, end: number): number {
    const payload = this.#payload
    if (payload === undefined) {
      const count = Math.min(this.#ordinary, end - at)
      this.#ordinary -= count
      return count
    }
    const count = Math.min(payload.length - payload.position, end - at)
    payload.target?.set(this.#scratch.subarray(at, at + count), payload.position)
    this.#from = at + count
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
