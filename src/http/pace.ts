import type { Readable } from 'node:stream'
import { setTimeout as delay } from 'node:timers/promises'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { ServiceError } from '../errors.js'
import { leastOf, type Pace, tooSlow } from '../link/pace.js'
import { bytesTaken } from '../link/websocket/socket.js'

// A client that was refused before its body ended has so long to read that, and to stop.
const LINGER_MS = 5000

/**
 * The preParsing hook of bodies that are read whole before their handler is called: one that comes too slowly is
 * refused with OVERLOADED. Streamed ones are their handler's, see `paced`.
 */
export function limitBody(pace: Pace): (request: FastifyRequest, reply: FastifyReply, body: Readable) => Promise<void> {
  return async ({ routeOptions, ws, raw: { socket } }, _reply, body) => {
    // The request of an upgrade never ends: its connection would be watched, and kept, after its socket was closed.
    if (routeOptions.config.streamed || ws) return
    const stop = watch(
      pace,
      () => socket.bytesRead,
      (moved) => body.emit('error', tooSlow(pace, moved)),
    )
    body.once('close', stop).once('end', stop).once('error', stop)
  }
}

/** The onSend hook that cuts the connection of a client that reads its answer too slowly; `cut` hears of each. */
export function limitAnswer(
  pace: Pace,
  cut: (error: ServiceError) => void,
): (request: FastifyRequest, reply: FastifyReply) => Promise<void> {
  return async ({ log, raw, bodyMeter }, reply) => {
    const { socket } = raw
    const stop = watch(
      pace,
      // What node has queued for a reader was not read: one that reads nothing would have a window for each piece.
      () => bytesTaken(socket),
      (moved) => {
        const error = tooSlow(pace, moved)
        log.info({ event: 'reader_too_slow', reason: error.message })
        cut(error)
        socket.destroy()
      },
      /* c8 ignore next -- a body that counts against no rate */
      () => bodyMeter?.heldBack() ?? false,
    )
    reply.raw.once('close', () => {
      stop()
      // What it still sends is read and thrown away, so that the refusal is not lost with its connection, but not for
      // ever.
      if (!raw.complete) setTimeout(() => !raw.complete && socket.destroy(), LINGER_MS).unref()
    })
  }
}

/**
 * A body as it comes; it ends with OVERLOADED where it comes too slowly. Only waiting for it counts: its reader may
 * be slow.
 */
export async function* paced(body: Readable, pace: Pace): AsyncGenerator<Uint8Array> {
  // An early end must leave the connection: the refusal is sent on it.
  const pieces: AsyncIterator<Uint8Array> = body.iterator({ destroyOnReturn: false })
  const windowMs = pace.send_timeout_seconds * 1000
  let [bytes, waited] = [0, 0]
  let next: ReturnType<typeof pieces.next> | undefined
  try {
    for (;;) {
      next ??= pieces.next()
      const started = performance.now()
      const piece = await within(next, windowMs - waited)
      waited += performance.now() - started
      bytes += piece?.value?.length ?? 0
      if (piece) next = undefined
      if (piece?.done) return
      if (!piece || waited >= windowMs) {
        if (bytes < leastOf(pace)) throw tooSlow(pace, bytes)
        ;[bytes, waited] = [0, 0]
      }
      if (piece) yield piece.value
    }
  } finally {
    // It would wait for the piece that does not come.
    if (next === undefined) await pieces.return?.()
  }
}

/** What a promise gives, or undefined where it takes longer. */
async function within<T>(promise: Promise<T>, milliseconds: number): Promise<T | undefined> {
  const over = new AbortController()
  const timeout = delay(milliseconds, undefined, { signal: over.signal }).catch(() => undefined)
  try {
    return await Promise.race([promise, timeout])
  } finally {
    over.abort()
    // Whoever does not wait any longer does not want to hear of its failure either.
    promise.catch(() => {})
  }
}

/**
 * Calls `slow` once, at the end of the first window in which too little moved, and `isHeld` did not answer that it was
 * the service that held bytes back; answers what stops that.
 */
function watch(pace: Pace, count: () => number, slow: (moved: number) => void, isHeld = () => false): () => void {
  let before = count()
  const timer = setInterval(() => {
    const moved = count() - before
    before += moved
    if (isHeld() || moved >= leastOf(pace)) return
    clearInterval(timer)
    slow(moved)
  }, pace.send_timeout_seconds * 1000).unref()
  return () => clearInterval(timer)
}
