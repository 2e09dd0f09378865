import { isIPv6 } from 'node:net'

/** Addresses whose refusals are counted at a time: with more of them the one that was refused first is forgotten. */
export const MOST_ADDRESSES = 10_000
const WINDOW_MS = 60_000

type Window = { readonly since: number; count: number }

/**
 * How often requests of an address were refused for their key, or at an upgrade. The right key passes however many
 * wrong ones came from its address, which may be that of a proxy with many clients behind it: guessing is hopeless
 * because of the length of keys, and what this bounds is the work and the log lines that refusals cost.
 */
export class Refusals {
  readonly #most: number
  readonly #windows = new Map<string, Window>()

  constructor(most: number) {
    this.#most = most
  }

  /**
   * Counts a refusal of an address; answers how many seconds it should wait, or 0 where it has had no more than it
   * may. `now` is as `performance.now` counts.
   */
  count(address: string, now = performance.now()): { count: number; most: number; wait_seconds: number } {
    const network = networkOf(address)
    const known = this.#windows.get(network)
    const window = known && now - known.since < WINDOW_MS ? known : { since: now, count: 0 }
    window.count += 1
    if (window !== known) this.#begin(network, window)
    const left = (window.since + WINDOW_MS - now) / 1000
    return { count: window.count, most: this.#most, wait_seconds: window.count > this.#most ? left : 0 }
  }

  #begin(network: string, window: Window): void {
    // The order of a map is that of its entries' first time.
    this.#windows.delete(network)
    this.#windows.set(network, window)
    const [oldest] = this.#windows.keys()
    if (this.#windows.size > MOST_ADDRESSES && oldest !== undefined) this.#windows.delete(oldest)
  }
}

/** An address, of version 6 the 64 bits of its network: whoever has one address of it has all of them. */
function networkOf(address: string): string {
  if (!isIPv6(address) || address.startsWith('::ffff:')) return address.replace(/^::ffff:/, '')
  const { hostname } = new URL(`http://[${address.split('%')[0]}]`)
  const groups = hostname
    .slice(1, -1)
    .split('::')
    .map((part) => part.split(':').filter(Boolean))
  const [front, back = []] = groups
  const zeros = new Array<string>(8 - front.length - back.length).fill('0')
  return [...front, ...zeros, ...back].slice(0, 4).join(':')
}
