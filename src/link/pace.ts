import type { Config } from '../config.js'
import { ServiceError } from '../errors.js'

// Whoever holds memory of the service by sending or reading gives it back by being too slow: `send_timeout_seconds`
// is a window, in which at least `min_bytes_per_second` for each of its seconds must move.

export type Pace = Pick<Config, 'send_timeout_seconds' | 'min_bytes_per_second'>

/** Bytes that must move in a window. */
export function leastOf({ send_timeout_seconds, min_bytes_per_second }: Pace): number {
  return send_timeout_seconds * min_bytes_per_second
}

/** The refusal of a peer for which so few bytes moved in a window. */
export function tooSlow(pace: Pace, moved: number): ServiceError {
  const message = `${moved} bytes moved within ${pace.send_timeout_seconds} seconds, at least ${Math.ceil(leastOf(pace))} must`
  return new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 })
}

/** Since when memory is held until bytes move, by performance.now(), and how many have moved so far. */
export type Held = { since: number; bytes: number }

/** The windows of a stream. They count only while memory is held: `since` is Infinity where none is. */
export class Window {
  readonly #pace: Pace
  #begun = { at: Number.NEGATIVE_INFINITY, bytes: 0 }

  constructor(pace: Pace) {
    this.#pace = pace
  }

  /** To be called several times in a window. Answers the refusal at the end of one in which too little moved. */
  check(now: number, { since, bytes }: Held): ServiceError | undefined {
    const { at, bytes: before } = this.#begun
    const holds = since <= at
    if (holds && now - at < this.#pace.send_timeout_seconds * 1000) return undefined
    this.#begun = { at: now, bytes }
    const moved = Math.max(0, bytes - before)
    return holds && moved < leastOf(this.#pace) ? tooSlow(this.#pace, moved) : undefined
  }
}

// What may wait for a peer that does not read: the sender's window, one more chunk, and some ten thousand small frames.
const UNREAD_BYTES = 32 << 20

/** Why a connection is ended that asks for more than it reads: answers would pile up without end. */
export function unreadProblem(bytes: number): ServiceError | undefined {
  if (bytes <= UNREAD_BYTES) return undefined
  const message = `${bytes} bytes wait to be read, at most ${UNREAD_BYTES} may`
  return new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 })
}
