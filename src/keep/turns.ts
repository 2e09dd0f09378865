/**
 * Work by name: of one name it is done one after the other, in the order of the calls; of different names side by
 * side.
 */
export class Turns {
  readonly #last = new Map<string, Promise<unknown>>()

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
