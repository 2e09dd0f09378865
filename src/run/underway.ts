/** Counts work that is under way, and tells when there is less of it. */
export class Underway {
  #count = 0
  #waiting: { below: number; resolve: () => void }[] = []

  get count(): number {
    return this.#count
  }

  begin(): void {
    this.#count += 1
  }

  end(): void {
    this.#count -= 1
    if (this.#waiting.length === 0) return
    const [told, waiting] = [
      this.#waiting.filter(({ below }) => this.#count < below),
      this.#waiting.filter(({ below }) => this.#count >= below),
    ]
    this.#waiting = waiting
    for (const { resolve } of told) resolve()
  }

  /** Counts a promise until it settles; answers it. */
  track<T>(work: Promise<T>): Promise<T> {
    this.begin()
    const end = () => this.end()
    work.then(end, end)
    return work
  }

  /** Resolves once less than so much is under way; more may have begun by then. */
  async below(most: number): Promise<void> {
    while (this.#count >= most)
      await new Promise<void>((resolve) => {
        this.#waiting.push({ below: most, resolve })
      })
  }
}
