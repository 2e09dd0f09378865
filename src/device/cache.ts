/** Values by key, made when they are first asked for. Of too many the least recently used one is dropped. */
export class Cache<Value> {
  readonly #most: number
  readonly #drop: (value: Value) => void
  // A Map keeps the order of insertion, so its first entry is the least recently used one.
  readonly #values = new Map<string, Value>()

  /** Holds `most` values; `drop` releases the resources of a value. */
  constructor(most: number, drop: (value: Value) => void) {
    this.#most = most
    this.#drop = drop
  }

  get(key: string, make: () => Value): Value {
    const value = this.#values.get(key) ?? make()
    this.#values.delete(key)
    this.#values.set(key, value)
    if (this.#values.size > this.#most) this.#dropOldest()
    return value
  }

  clear(): void {
    while (this.#values.size > 0) this.#dropOldest()
  }

  #dropOldest(): void {
    const [[key, value]] = this.#values
    this.#values.delete(key)
    this.#drop(value)
  }
}
