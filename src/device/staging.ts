/** A reserved range of the staging arena: `offset` and `bytes` from the arena's start. */
export type Slot = { readonly offset: number; readonly bytes: number }

type Waiter = { bytes: number; resolve: (slot: Slot) => void }

// Tensors start on a cache line, which also keeps every dtype aligned.
const ALIGNMENT = 64

/**
 * Hands out ranges of one arena of fixed size, first fit, so that memory which was touched before is used again.
 * Reservations are granted strictly in the order in which they were asked for: no tensor starves behind smaller ones.
 */
export class Staging {
  readonly capacity: number
  used = 0
  #free: { offset: number; bytes: number }[]
  #waiters: Waiter[] = []

  constructor(capacity: number) {
    this.capacity = capacity
    this.#free = [{ offset: 0, bytes: capacity }]
  }

  /** How many reservations wait for memory. */
  get waiting(): number {
    return this.#waiters.length
  }

  /** Whether a tensor of `bytes` can ever be held. */
  fits(bytes: number): boolean {
    return aligned(bytes) <= this.capacity
  }

  /** Reserves `bytes` as soon as everybody before has been served; undefined where the signal aborts first. */
  async reserve(bytes: number, signal: AbortSignal): Promise<Slot | undefined> {
    if (signal.aborted) return undefined
    const slot = this.tryReserve(bytes)
    if (slot !== undefined) return slot
    return new Promise((resolve) => {
      const leave = () => {
        this.#waiters = this.#waiters.filter((other) => other !== waiter)
        resolve(undefined)
        this.#serve()
      }
      const grant = (granted: Slot) => {
        signal.removeEventListener('abort', leave)
        resolve(granted)
      }
      const waiter = { bytes, resolve: grant }
      signal.addEventListener('abort', leave, { once: true })
      this.#waiters.push(waiter)
    })
  }

  /** Reserves `bytes` now, or answers undefined: there is no room, or somebody waits already. */
  tryReserve(bytes: number): Slot | undefined {
    return this.#waiters.length > 0 ? undefined : this.#take(bytes)
  }

  release(slot: Slot): void {
    const size = aligned(slot.bytes)
    this.used -= size
    const after = this.#free.findIndex((range) => range.offset > slot.offset)
    this.#free.splice(after < 0 ? this.#free.length : after, 0, { offset: slot.offset, bytes: size })
    this.#merge()
    this.#serve()
  }

  #take(bytes: number): Slot | undefined {
    const size = aligned(bytes)
    const range = this.#free.find((candidate) => candidate.bytes >= size)
    if (range === undefined) return undefined
    const offset = range.offset
    range.offset += size
    range.bytes -= size
    if (range.bytes === 0) this.#free = this.#free.filter((other) => other !== range)
    this.used += size
    return { offset, bytes }
  }

  #merge(): void {
    const merged: { offset: number; bytes: number }[] = []
    for (const range of this.#free) {
      const last = merged.at(-1)
      if (last !== undefined && last.offset + last.bytes === range.offset) last.bytes += range.bytes
      else merged.push(range)
    }
    this.#free = merged
  }

  #serve(): void {
    for (let waiter = this.#waiters[0]; waiter !== undefined; waiter = this.#waiters[0]) {
      const slot = this.#take(waiter.bytes)
      if (slot === undefined) return
      this.#waiters.shift()
      waiter.resolve(slot)
    }
  }
}

/** `bytes` rounded up to whole cache lines, or to a multiple of another alignment. */
export function aligned(bytes: number, alignment = ALIGNMENT): number {
  return Math.ceil(bytes / alignment) * alignment
}
