import type { Region } from './region.js'

type Waiter = { bytes: number; granted: (region: Region) => void }

/** A free part of the arena, from `offset` on. */
type Gap = { offset: number; bytes: number }

// A cache line: a tensor that starts on one is aligned for every dtype, too.
const ALIGNMENT = 64

/**
 * Deals out regions of one arena of fixed size, first fit, so that memory which was touched before is used again.
 * Reservations are granted strictly in the order in which they were asked for: no tensor starves behind smaller ones.
 */
export class Staging {
  used = 0
  /** Called when a reservation finds no room: whoever can do without its region gives it back then. */
  readonly pressed = new Set<() => void>()
  readonly #whole: Region
  #free: Gap[]
  #waiters: Waiter[] = []
  #closed = false

  /** Takes over `whole`, the memory of the arena. */
  constructor(whole: Region) {
    this.#whole = whole
    this.#free = [{ offset: 0, bytes: whole.bytes }]
  }

  get capacity(): number {
    return this.#whole.bytes
  }

  /** How many reservations wait for memory. */
  get waiting(): number {
    return this.#waiters.length
  }

  /** Whether the arena is large enough for a tensor of `bytes`. */
  fits(bytes: number): boolean {
    return aligned(bytes) <= this.capacity
  }

  /** Whether a region is part of the arena. */
  has({ owner }: Region): boolean {
    return owner.pointer === this.#whole.owner.pointer
  }

  /**
   * Has `granted` called with `bytes` bytes after earlier reservations and when there is room, never before this
   * returns. Answers what gives the reservation up, which does nothing once it was granted.
   */
  wait(bytes: number, granted: (region: Region) => void): () => void {
    const waiter = { bytes, granted }
    this.#waiters.push(waiter)
    return () => {
      this.#waiters = this.#waiters.filter((other) => other !== waiter)
      this.#serve()
    }
  }

  /** Reserves `bytes` now; undefined where there is no room, or another reservation waits. */
  tryReserve(bytes: number): Region | undefined {
    const region = this.#reserve(bytes)
    if (region !== undefined || this.pressed.size === 0) return region
    for (const makeRoom of [...this.pressed]) makeRoom()
    return this.#reserve(bytes)
  }

  /** Frees the arena's memory once nothing of it is reserved any more. */
  close(): void {
    this.#closed = true
    this.#end()
  }

  #reserve(bytes: number): Region | undefined {
    return this.#waiters.length > 0 ? undefined : this.#take(bytes)
  }

  #end(): void {
    if (this.#closed && this.used === 0) this.#whole.release()
  }

  #take(bytes: number): Region | undefined {
    const size = aligned(bytes)
    const gap = this.#free.find((candidate) => candidate.bytes >= size)
    if (gap === undefined) return undefined
    const { offset } = gap
    gap.offset += size
    gap.bytes -= size
    if (gap.bytes === 0) this.#free = this.#free.filter((other) => other !== gap)
    this.used += size
    return this.#whole.carve(offset, bytes, () => this.#giveBack({ offset, bytes: size }))
  }

  #giveBack(gap: Gap): void {
    this.used -= gap.bytes
    const after = this.#free.findIndex(({ offset }) => offset > gap.offset)
    this.#free.splice(after < 0 ? this.#free.length : after, 0, gap)
    this.#merge()
    this.#serve()
    this.#end()
  }

  #merge(): void {
    const merged: Gap[] = []
    for (const gap of this.#free) {
      const last = merged.at(-1)
      if (last !== undefined && last.offset + last.bytes === gap.offset) last.bytes += gap.bytes
      else merged.push(gap)
    }
    this.#free = merged
  }

  #serve(): void {
    for (let waiter = this.#waiters[0]; waiter !== undefined; waiter = this.#waiters[0]) {
      const region = this.#take(waiter.bytes)
      if (region === undefined) return
      this.#waiters.shift()
      waiter.granted(region)
    }
  }
}

/** `bytes` rounded up to whole cache lines, or to a multiple of another alignment. */
export function aligned(bytes: number, alignment = ALIGNMENT): number {
  return Math.ceil(bytes / alignment) * alignment
}
