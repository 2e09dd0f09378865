/** A lease as it was found: `version` is another one after each renewal. */
export type Renewal = { readonly name: string; readonly version: string; readonly lease_seconds: number }

type Watched = { readonly version: string; readonly since: number }

/**
 * Tells leases that are renewed from those that have ended, without a clock of another machine: one has ended when it
 * has been watched for its length and was not renewed. What was not watched does not count: after a time in which
 * nothing could be read every lease has its whole length again, since nobody could renew either.
 */
export class Renewals {
  #watched = new Map<string, Watched>()
  #isInterrupted = false

  /** Nothing could be read. */
  interrupted(): void {
    this.#isInterrupted = true
  }

  /**
   * For all leases of one reading: for how many of its lengths each has not been renewed. `now` is as `performance.now`
   * counts.
   */
  see(found: readonly Renewal[], now = performance.now()): ReadonlyMap<string, number> {
    const watched = this.#isInterrupted ? new Map<string, Watched>() : this.#watched
    this.#isInterrupted = false
    this.#watched = new Map(
      found.map(({ name, version }) => {
        const before = watched.get(name)
        return [name, before?.version === version ? before : { version, since: now }]
      }),
    )
    return new Map(
      found.map(({ name, lease_seconds }) => {
        const { since } = this.#watched.get(name) ?? { since: now }
        return [name, (now - since) / 1000 / lease_seconds]
      }),
    )
  }
}
