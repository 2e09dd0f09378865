import { randomInt } from 'node:crypto'
import timers from 'node:timers/promises'

export type Backoff = {
  /** The longest first wait; each further one may be twice as long. */
  first_seconds: number
  /** No wait is longer, unless the service named one itself. */
  most_seconds: number
  /** A number in [0, 1). Give a seeded one to repeat the waits. */
  random: () => number
}

export const BACKOFF: Backoff = {
  first_seconds: 0.1,
  most_seconds: 10,
  random: () => randomInt(2 ** 32) / 2 ** 32,
}

/**
 * Seconds before attempt `attempt` (from 0): half of an exponentially growing bound is certain, half is random, so that
 * the clients of a service that restarted do not all come back at once.
 */
export function backoffSeconds(attempt: number, backoff: Backoff, atLeast = 0): number {
  const bound = Math.min(backoff.most_seconds, backoff.first_seconds * 2 ** attempt)
  return atLeast + bound * (0.5 + 0.5 * backoff.random())
}

/** Resolves after that many seconds; rejects with the signal's reason as soon as it is aborted. */
export async function sleep(seconds: number, signal: AbortSignal): Promise<void> {
  try {
    await timers.setTimeout(1000 * seconds, undefined, { signal })
  } catch {
    // Only the signal ends the wait early, and its reason says more than the timer's AbortError.
    throw signal.reason
  }
}
