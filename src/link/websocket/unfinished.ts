import assert from 'node:assert'
import type { Socket } from 'node:net'
import type { WebSocket } from 'ws'
import { ServiceError } from '../../errors.js'
import { encodeFrame } from '../../wire/codec.js'

// A piece of a message is a Buffer of its own, which takes so much beside its bytes, with what the collector has not
// taken back yet.
const PIECE_BYTES = 1024

/**
 * The memory of messages that have begun to arrive and not ended, over all connections. ws keeps each of them until
 * its last byte, so a limit for one message is none for the process. Beyond `limit` bytes the connection that keeps
 * most is ended with OVERLOADED, whichever brought the last byte: those that send whole messages are let be.
 */
export class UnfinishedMessages {
  readonly #limit: number
  readonly #ended: (error: ServiceError) => void
  readonly #kept = new Map<WebSocket, { bytes: number; stream: Socket }>()
  #bytes = 0

  /** `ended` hears of every connection that was ended. */
  constructor(limit: number, ended: (error: ServiceError) => void) {
    this.#limit = limit
    this.#ended = ended
  }

  /** Bytes that wait for the end of their messages. */
  get bytes(): number {
    return this.#bytes
  }

  /** Counts what a WebSocket keeps; `stream` is the socket below it. */
  watch(socket: WebSocket, stream: Socket): void {
    const kept = { bytes: 0, stream }
    this.#kept.set(socket, kept)
    // ws listens too, and before: it has taken out what was complete.
    stream.on('data', () => {
      const bytes = keptBytes(socket)
      this.#bytes += bytes - kept.bytes
      kept.bytes = bytes
      if (this.#bytes > this.#limit) this.#endLargest()
    })
    socket.once('close', () => this.#forget(socket))
  }

  #forget(socket: WebSocket): void {
    this.#bytes -= this.#kept.get(socket)?.bytes ?? 0
    this.#kept.delete(socket)
  }

  #endLargest(): void {
    const [largest] = [...this.#kept].sort(([, one], [, other]) => other.bytes - one.bytes)
    assert(largest, 'where bytes are kept, a connection keeps them')
    const [socket, { bytes, stream }] = largest
    const error = new ServiceError(
      'OVERLOADED',
      `unfinished messages take ${this.#bytes} bytes, at most ${this.#limit}, and ${bytes} of them are of this connection`,
      { retry_after_seconds: 1 },
    )
    stream.removeAllListeners('data')
    this.#forget(socket)
    const { code, message, status, retryable, fields } = error
    socket.send(encodeFrame({ type: 'error', code, message, status, retryable, ...fields }))
    socket.close(error.close, code)
    // Its memory must be free before the next connection grows: nothing more is read, not even the answer to the close.
    stream.destroySoon()
    this.#ended(error)
  }
}

/**
 * What ws' receiver holds back: pieces of the present frame, and the frames of a message before it (ws 8,
 * lib/receiver.js).
 */
function keptBytes(socket: WebSocket): number {
  const receiver: object = Reflect.get(socket, '_receiver')
  const [pieces, frames]: unknown[][] = [Reflect.get(receiver, '_buffers'), Reflect.get(receiver, '_fragments')]
  const bytes: number = Reflect.get(receiver, '_bufferedBytes') + Reflect.get(receiver, '_messageLength')
  return bytes + (pieces.length + frames.length) * PIECE_BYTES
}
