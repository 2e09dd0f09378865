import { MuondError } from '../error.js'
import { type Backoff, backoffSeconds, sleep } from './backoff.js'

export type Patience = {
  /** Consecutive failed attempts that brought nothing new, before the last error counts. */
  retries: number
  backoff: Backoff
  signal: AbortSignal
  /** How many updates were applied so far: an attempt that brought some counts as the first. */
  applied: () => number
  /** An attempt has failed: what it began is over. */
  failed: (error: unknown) => void
}

/** Does `attempt` until it succeeds; rejects with what is not worth a retry. */
export async function outlast<T>(
  attempt: () => Promise<T>,
  { retries, backoff, signal, applied, failed }: Patience,
): Promise<T> {
  let failures = 0
  for (;;) {
    const before = applied()
    let wait: number
    try {
      return await attempt()
    } catch (error) {
      failed(error)
      failures = applied() > before ? 1 : failures + 1
      if (!isWorthAnother(error) || failures > retries) throw error
      wait = backoffSeconds(failures - 1, backoff, error.fields.retry_after_seconds)
    }
    await sleep(wait, signal)
  }
}

/**
 * A quorum was waited for as often as allowed over one connection already: another one brings no replica. Where shards
 * have another assignment by now, the next attempt learns it.
 */
function isWorthAnother(error: unknown): error is MuondError {
  if (!(error instanceof MuondError)) return false
  return (error.retryable && error.code !== 'QUORUM_LOST') || error.code === 'STALE_GENERATION'
}
