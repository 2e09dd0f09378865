import { setTimeout as delay } from 'node:timers/promises'

/** A lease is renewed three times in its length, so that two renewals may be lost. */
export const LOOKS_PER_LEASE = 3

/** Looks again and again, one look at a time, with a pause of a third of a lease between two. */
export class Looks {
  /** Milliseconds between two looks. */
  readonly pause_ms: number
  readonly #look: () => Promise<void>
  readonly #ended = new AbortController()
  #done: Promise<void> = Promise.resolve()

  constructor(lease_seconds: number, look: () => Promise<void>) {
    this.pause_ms = (lease_seconds * 1000) / LOOKS_PER_LEASE
    this.#look = look
  }

  start(): void {
    this.#done = this.#run()
  }

  /** No look follows that which is going on. */
  end(): void {
    this.#ended.abort()
  }

  /** Resolves when the look that is going on has ended, too. */
  async stop(): Promise<void> {
    this.end()
    await this.#done
  }

  async #run(): Promise<void> {
    const { signal } = this.#ended
    while (await this.#pause(signal)) await this.#look()
  }

  async #pause(signal: AbortSignal): Promise<boolean> {
    return delay(this.pause_ms, true, { signal }).catch(() => false)
  }
}
