/** The unit of the device that each part goes to, and the bytes that each unit gets. */
export type Placement = { readonly units: readonly number[]; readonly bytes: readonly number[] }

/**
 * Shares parts out by their bytes: the largest first, each to the unit that has the fewest bytes, with those that it
 * has `taken` before. Equal arguments give equal placements.
 */
export function placement(parts: readonly number[], taken: readonly number[]): Placement {
  const units = new Array<number>(parts.length).fill(0)
  // Sorting a hundred thousand of them would take the event loop for long.
  if (taken.length === 1) return { units, bytes: [parts.reduce((sum, size) => sum + size, 0)] }
  const bytes = taken.map(() => 0)
  const load = [...taken]
  const largestFirst = parts.map((size, index) => ({ size, index })).sort((a, b) => b.size - a.size)
  for (const { size, index } of largestFirst) {
    const unit = load.indexOf(Math.min(...load))
    units[index] = unit
    bytes[unit] += size
    load[unit] += size
  }
  return { units, bytes }
}
