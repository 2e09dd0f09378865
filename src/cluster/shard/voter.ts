import { setTimeout as delay } from 'node:timers/promises'
import { ServiceError } from '../../errors.js'
import type { Vote } from '../vote.js'

const FIRST_WAIT_MS = 50
const MOST_WAIT_MS = 2000

export type VoterParts = {
  /** Sends a vote to the head. */
  send: (vote: Vote, signal: AbortSignal) => Promise<void>
  /** The head refuses the votes of this shard. */
  refused: (error: ServiceError) => void
  /** The head has not taken a vote yet: it is tried again. */
  failed: (error: ServiceError) => void
}

/** Sends the newest vote of a shard until the head has taken or refused it. */
export class Voter {
  readonly #parts: VoterParts
  #under: AbortController | undefined

  constructor(parts: VoterParts) {
    this.#parts = parts
  }

  /** A vote of an earlier step, or of an older generation, is given up. */
  cast(vote: Vote): void {
    this.close()
    this.#under = new AbortController()
    void this.#cast(vote, this.#under.signal)
  }

  close(): void {
    this.#under?.abort()
  }

  async #cast(vote: Vote, signal: AbortSignal): Promise<void> {
    for (let wait = FIRST_WAIT_MS; !signal.aborted; wait = Math.min(2 * wait, MOST_WAIT_MS)) {
      const error = await this.#parts.send(vote, signal).then(
        () => undefined,
        /* c8 ignore next -- a bug of ours is told as one */
        (reason) => (reason instanceof ServiceError ? reason : new ServiceError('INTERNAL', String(reason))),
      )
      if (error === undefined || signal.aborted) return
      if (!error.retryable) return this.#parts.refused(error)
      this.#parts.failed(error)
      await delay(wait, undefined, { signal, ref: false }).catch(() => undefined)
    }
  }
}
