import type { Region } from './region.js'

type Waiter = { bytes: number; resolve: (region: Region) => void }

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
  readonly #whole: Region
  #free: Gap[]
  #waiters: Waiter[] = []

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

  /** Reserves `bytes` after earlier reservations and when there is room; undefined if the signal aborts first. */
  async reserve(bytes: number, signal: AbortSignal): Promise<Region | undefined> {
    if (signal.aborted) return undefined
    const region = this.tryReserve(bytes)
    if (region !== undefined) return region
    return new Promise((resolve) => {
      const leave = () => {
        this.#waiters = this.#waiters.filter((other) => other !== waiter)
        resolve(undefined)
        this.#serve()
      }
      const grant = (granted: Region) => {
        signal.removeEventListener('abort', leave)
        resolve(granted)
      }
      const waiter: Waiter = { bytes, resolve: grant }
      signal.addEventListener('abort', leave, { once: true })
      this.#waiters.push(waiter)
    })
  }

  /** Reserves `bytes` now; undefined where there is no room, or another reservation waits. */
  tryReserve(bytes: number): Region | undefined {
    return this.#waiters.length > 0 ? undefined : this.#take(bytes)
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
      waiter.resolve(region)
    }
  }
}

/** `bytes` rounded up to whole cache lines, or to a multiple of another alignment. */
export function aligned(bytes: number, alignment = ALIGNMENT): number {
  return Math.ceil(bytes / alignment) * alignment
}
