/** How many receipts wait for a reader that is slower than the steps. */
export const RECEIPTS_KEPT = 1024

/**
 * Hands every item to every reader. A reader that falls more than RECEIPTS_KEPT items behind loses the oldest: training
 * must not stop for an observer, and receipts are numbered, so the gap shows.
 */
export class Feed<Item> {
  readonly #readers = new Set<Reader<Item>>()
  #ended = false

  push(item: Item): void {
    for (const reader of this.#readers) reader.push(item)
  }

  /** Readers get what they have not read yet, then the end. */
  end(): void {
    this.#ended = true
    for (const reader of this.#readers) reader.end()
  }

  /** From now on; leaving the loop (`break`, `return()`) releases the reader. */
  read(): AsyncIterableIterator<Item> {
    const reader = new Reader<Item>(() => this.#readers.delete(reader))
    if (this.#ended) reader.end()
    else this.#readers.add(reader)
    return reader
  }
}

class Reader<Item> implements AsyncIterableIterator<Item> {
  readonly #items: Item[] = []
  readonly #waiting: ((result: IteratorResult<Item>) => void)[] = []
  readonly #release: () => void
  #ended = false

  constructor(release: () => void) {
    this.#release = release
  }

  push(item: Item): void {
    const waiting = this.#waiting.shift()
    if (waiting !== undefined) return waiting({ value: item, done: false })
    if (this.#items.length === RECEIPTS_KEPT) this.#items.shift()
    this.#items.push(item)
  }

  end(): void {
    this.#ended = true
    for (const waiting of this.#waiting.splice(0)) waiting({ value: undefined, done: true })
  }

  next(): Promise<IteratorResult<Item>> {
    const item = this.#items.shift()
    if (item !== undefined) return Promise.resolve({ value: item, done: false })
    if (this.#ended) return Promise.resolve({ value: undefined, done: true })
    return new Promise((resolve) => this.#waiting.push(resolve))
  }

  return(): Promise<IteratorResult<Item>> {
    this.#release()
    this.#items.length = 0
    this.end()
    return Promise.resolve({ value: undefined, done: true })
  }

  [Symbol.asyncIterator](): AsyncIterableIterator<Item> {
    return this
  }
}
