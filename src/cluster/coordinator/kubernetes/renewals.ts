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
   * For each lease of one reading, for how many of its lengths it has not been renewed. `now` is as `performance.now`
   * counts.
   */
  see(found: readonly Renewal[], now = performance.now()): readonly number[] {
    const before = this.#watched
    this.#watched = new Map(
      found.map(({ name, version }) => {
        const known = before.get(name)
        return [name, known?.version === version ? known : { version, since: now }]
      }),
    )
    const sinces = [...this.#watched.values()].map(({ since }) => since)
    return found.map(({ lease_seconds }, i) => (now - sinces[i]) / 1000 / lease_seconds)
  }
}
