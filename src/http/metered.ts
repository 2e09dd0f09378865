import type { Socket } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import type { FastifyRequest } from 'fastify'
import { Meter } from '../access/meter.js'
import type { Rate } from '../access/rate.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** Of the state that a request reads or imports; null on routes that are open to all. */
    bodyMeter: BodyMeter | null
  }
}

/** The onRequest hook that gives each request its meter. `all` is the rate of all principals together. */
export function meterBodies(all: Rate): (request: FastifyRequest) => Promise<void> {
  return async (request) => {
    const { principal, raw } = request
    if (principal !== null) request.bodyMeter = new BodyMeter(new Meter(principal.rate, all), raw.socket)
  }
}

/** Lets the state that a request reads or imports move as fast as its principal may, and counts it. */
export class BodyMeter {
  readonly #meter: Meter
  readonly #socket: Socket
  #held = false
  #holding = false

  constructor(meter: Meter, socket: Socket) {
    this.#meter = meter
    this.#socket = socket
  }

  /** Whether bytes were held back since the last call: then it is not the client who is slow. */
  heldBack(): boolean {
    const held = this.#held || this.#holding
    this.#held = false
    return held
  }

  /** The same pieces, each once those before it have taken their time. Ends early where the client is gone. */
  async *pass<T extends Uint8Array>(pieces: AsyncIterable<T>): AsyncGenerator<T, void, void> {
    const gone = new AbortController()
    const over = () => gone.abort()
    this.#socket.once('close', over)
    try {
      for await (const piece of pieces) {
        if (!(await this.#waited(gone.signal))) return
        this.#meter.spend(piece.length)
        yield piece
      }
    } finally {
      this.#socket.off('close', over)
    }
  }

  /** Waits until more may move; whether the client is still there. */
  async #waited(signal: AbortSignal): Promise<boolean> {
    for (let wait = this.#meter.wait(); wait > 0 && !signal.aborted; wait = this.#meter.wait()) {
      this.#holding = true
      await delay(wait, undefined, { signal }).catch(() => undefined)
      this.#holding = false
      this.#held = true
    }
    return !signal.aborted
  }
}

/** The meter of a request to a route that takes a key. */
export function bodyMeterIn({ bodyMeter, routeOptions }: FastifyRequest): BodyMeter {
  if (bodyMeter !== null) return bodyMeter
  /* c8 ignore start -- a bug: every route about runs takes a key */
  throw new Error(`${routeOptions.url} is open to all, and has no meter`)
}
/* c8 ignore stop */
