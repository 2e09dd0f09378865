import { createHash } from 'node:crypto'

/** The processes that runs may be spread over: a list that is the same in each of them. */
export class Peers {
  /** The URL of this process. */
  readonly self: string
  readonly #urls: readonly string[]

  constructor(urls: readonly string[], self: string) {
    this.self = self
    this.#urls = urls
  }

  has(url: string): boolean {
    return this.#urls.includes(url)
  }

  /** The process that commits the steps of a run: a function of its name and the list, the same in every process. */
  headOf(run: string): string {
    return this.inOrder(run)[0]
  }

  /**
   * All processes, by their rank for a run (rendezvous hashing, Thaler and Ravishankar 1998): the head is the first,
   * and the shards go around from it, so that the small runs of many clients spread over all.
   */
  inOrder(run: string): readonly string[] {
    const rank = (url: string) => createHash('sha256').update(`${run}\n${url}`).digest('hex')
    const ranked = this.#urls.map((url) => ({ url, rank: rank(url) }))
    return ranked.sort((one, other) => (one.rank > other.rank ? -1 : 1)).map(({ url }) => url)
  }
}
