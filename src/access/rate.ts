// What may come at once: half a second's bytes, so that a step which is sent in a burst is not held up by a timer.
const BURST_SECONDS = 0.5

/**
 * How many bytes a second may come; what comes beyond is a debt that goes down with time. Without a limit none does.
 */
export class Rate {
  readonly #limit: () => number | undefined
  #debt = 0
  #countedAt: number
  #second: { at: number; bytes: number; before: number }

  /** `now` is as `performance.now` counts, here and below. */
  constructor(limit: () => number | undefined, now = performance.now()) {
    this.#limit = limit
    this.#countedAt = now
    this.#second = { at: now, bytes: 0, before: 0 }
  }

  /** Bytes have come. */
  spend(bytes: number, now = performance.now()): void {
    this.#settle(now)
    this.#debt += bytes
    this.#second.bytes += bytes
  }

  /** Milliseconds until more should be read. */
  wait(now = performance.now()): number {
    this.#settle(now)
    const limit = this.#limit()
    return limit === undefined ? 0 : Math.max(0, (this.#debt / limit - BURST_SECONDS) * 1000)
  }

  /** How many bytes came in the second before the one in progress. */
  last(now = performance.now()): number {
    this.#settle(now)
    return this.#second.before
  }

  #settle(now: number): void {
    const limit = this.#limit()
    this.#debt = limit === undefined ? 0 : Math.max(0, this.#debt - ((now - this.#countedAt) / 1000) * limit)
    this.#countedAt = now
    const { at, bytes } = this.#second
    if (now - at < 1000) return
    this.#second = { at: now, bytes: 0, before: now - at < 2000 ? bytes : 0 }
  }
}
