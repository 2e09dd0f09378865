import type { Rate } from './rate.js'

/** Counts the bytes that a principal moves against every rate that they count for: its own, and that of all. */
export class Meter {
  readonly #rates: readonly Rate[]

  constructor(...rates: readonly Rate[]) {
    this.#rates = rates
  }

  spend(bytes: number): void {
    for (const rate of this.#rates) rate.spend(bytes)
  }

  /** Milliseconds until more should move. */
  wait(): number {
    return Math.max(...this.#rates.map((rate) => rate.wait()))
  }
}
