import type { WebSocket } from 'ws'
import { InPlaceWebSocket } from './socket.js'

// Signs of life come every few seconds, fragments are large. So many a second take less than a hundredth of a core.
const FRAMES_PER_SECOND = 250
// The header of a ping or pong, without and with the mask that clients put on theirs (RFC 6455, section 5.2).
const [UNMASKED_BYTES, MASKED_BYTES] = [2, 6]

/**
 * The smallest frames of a connection, which bring next to nothing and take as long as others: pings, pongs, and the
 * fragments of messages that are cut into very many. A ping is answered once the pong before it has left, and of those
 * that have come meanwhile the last one alone (RFC 6455, section 5.5.3): ws would answer each, and cut a client without
 * a word whose pings come faster than turns of the event loop.
 */
export class SmallFrames {
  /** Bytes of all pings and pongs that have come and gone: signs of life, and no progress. */
  controlBytes = 0
  readonly #socket: WebSocket
  readonly #excess: () => void
  /** The pong that the kernel has not taken yet, and what the one after it has to say. */
  #pong: { next: Buffer | undefined } | undefined
  /** Frames that have come beyond FRAMES_PER_SECOND, at the time at which they were counted. */
  #debt = 0
  #countedAt = performance.now()

  /** `excess` is called with each frame that has come too soon: the connection should not be read for `wait`. */
  constructor(socket: WebSocket, excess: () => void) {
    this.#socket = socket
    this.#excess = excess
    socket.on('ping', (data) => this.#pinged(data))
    socket.on('pong', (data) => this.#received(MASKED_BYTES + data.length))
    if (socket instanceof InPlaceWebSocket) {
      socket.skipped = (bytes) => this.#received(bytes)
      socket.small = () => this.#received(0)
    }
  }

  /** Milliseconds until the connection may send half a second's frames at once. */
  get wait(): number {
    this.#settle()
    return Math.max(0, (this.#debt / FRAMES_PER_SECOND - 0.5) * 1000)
  }

  #received(bytes: number): void {
    this.#settle()
    this.#debt += 1
    this.controlBytes += bytes
    if (this.#debt > FRAMES_PER_SECOND) this.#excess()
  }

  #settle(): void {
    const now = performance.now()
    this.#debt = Math.max(0, this.#debt - ((now - this.#countedAt) / 1000) * FRAMES_PER_SECOND)
    this.#countedAt = now
  }

  #pinged(data: Buffer): void {
    this.#received(MASKED_BYTES + data.length)
    if (this.#pong) this.#pong.next = data
    else this.#answer(data)
  }

  #answer(data: Buffer): void {
    const pong: { next: Buffer | undefined } = { next: undefined }
    this.#pong = pong
    this.#socket.pong(data, false, (error) => {
      this.#pong = undefined
      if (error) return
      this.controlBytes += UNMASKED_BYTES + data.length
      if (pong.next) this.#answer(pong.next)
    })
  }
}
