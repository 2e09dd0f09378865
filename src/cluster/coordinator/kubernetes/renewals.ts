/** A lease as it was found: `version` is another one after each renewal. */
export type Renewal = { readonly name: string; readonly version: string; readonly lease_seconds: number }

type Watched = { readonly version: string; readonly since: number }

/**
 * Tells leases that are renewed from those that have ended, without a clock of another machine: one has ended when it
 * has been watched for its length and was not renewed.
 */
export class Renewals {
  #watched = new Map<string, Watched>()

  /**
   * For all leases of one reading: for how many of its lengths each has not been renewed. `now` is as `performance.now`
   * counts.
   */
  see(found: readonly Renewal[], now = performance.now()): ReadonlyMap<string, number> {
    const watched = new Map<string, Watched>()
    const lengths = new Map<string, number>()
    for (const { name, version, lease_seconds } of found) {
      const before = this.#watched.get(name)
      const since = before?.version === version ? before.since : now
      watched.set(name, { version, since })
      lengths.set(name, (now - since) / 1000 / lease_seconds)
    }
    this.#watched = watched
    return lengths
  }
}
