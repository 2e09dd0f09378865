import { createHash } from 'node:crypto'

/**
 * The url that a name belongs to: that with the highest hash of both (Thaler and Ravishankar 1998, "Using name-based
 * mappings to increase hit rates"). Where a url comes or goes, only the names that it gains or has lost move.
 */
export function highestRendezvous(name: string, urls: readonly string[]): string {
  const ranked = urls.map((url) => ({ url, hash: createHash('sha256').update(`${name}\n${url}`).digest('hex') }))
  return ranked.reduce((best, each) => (each.hash > best.hash ? each : best)).url
}
