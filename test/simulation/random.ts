/** Numbers that a seed decides (xorshift32): equal seeds give equal numbers on every machine. */
export class Random {
  #state: number

  constructor(seed: number) {
    // Seeds that follow each other begin far from each other. An odd number times an odd one is never 0.
    this.#state = Math.imul(2 * seed + 1, 0x9e3779b1) >>> 0
    for (let i = 0; i < 4; i += 1) this.#next()
  }

  /** From 0 up to 1. */
  fraction(): number {
    return this.#next() / 2 ** 32
  }

  /** A whole number from `least` to `most`. */
  whole(least: number, most: number): number {
    return least + Math.floor(this.fraction() * (most - least + 1))
  }

  chance(probability: number): boolean {
    return this.fraction() < probability
  }

  one<T>(choices: readonly T[]): T {
    return choices[this.whole(0, choices.length - 1)] as T
  }

  #next(): number {
    this.#state ^= this.#state << 13
    this.#state ^= this.#state >>> 17
    this.#state ^= this.#state << 5
    this.#state >>>= 0
    return this.#state
  }
}
