// Below this many the gap at the front costs less than closing it.
const SMALL_GAP = 1024

/** First in, first out. `Array.shift` moves every element of an array that has more than some ten thousand. */
export class Queue<T> {
  #items: (T | undefined)[] = []
  #first = 0

  get length(): number {
    return this.#items.length - this.#first
  }

  push(item: T): void {
    this.#items.push(item)
  }

  /** Takes the first item out; undefined where there is none. */
  shift(): T | undefined {
    const item = this.#items[this.#first]
    if (this.length === 0) return undefined
    this.#items[this.#first] = undefined
    this.#first += 1
    if (this.#first > SMALL_GAP && this.#first * 2 > this.#items.length) this.#close()
    return item
  }

  /** Takes all items out. */
  *drain(): Generator<T> {
    for (let item = this.shift(); item !== undefined; item = this.shift()) yield item
  }

  #close(): void {
    this.#items = this.#items.slice(this.#first)
    this.#first = 0
  }
}
