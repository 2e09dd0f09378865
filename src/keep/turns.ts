/**
 * Work by name: of one name it is done one after the other, in the order of the calls; of different names side by
 * side.
 */
export class Turns {
  readonly #last = new Map<string, Promise<unknown>>()

  /** Whether work of this name is under way or waits. */
  has(name: string): boolean {
    return this.#last.has(name)
  }

  /** Does `work` in a turn of each of the names; they are taken in one order, so that no two wait for each other. */
  takeAll<T>(names: readonly string[], work: () => Promise<T>): Promise<T> {
    const [first, ...rest] = [...new Set(names)].sort()
    return first === undefined ? work() : this.take(first, () => this.takeAll(rest, work))
  }

  /** Does `work` once everything before it of this name has ended, however that ended. */
  async take<T>(name: string, work: () => Promise<T>): Promise<T> {
    const before = this.#last.get(name)
    const turn = (before ?? Promise.resolve()).then(work)
    const settled = turn.catch(() => undefined)
    this.#last.set(name, settled)
    try {
      return await turn
    } finally {
      if (this.#last.get(name) === settled) this.#last.delete(name)
    }
  }
}
