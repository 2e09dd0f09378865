export function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2
}

export function rms(values: ArrayLike<number>): number {
  let squares = 0
  for (let i = 0; i < values.length; i++) squares += values[i] ** 2
  return Math.sqrt(squares / values.length)
}

/** Mean and range, as text: `1.95 (1.93 … 1.98)`. */
export function spread(values: readonly number[], digits: number): string {
  const [middle, low, high] = [mean(values), Math.min(...values), Math.max(...values)].map((v) => v.toFixed(digits))
  return low === high ? middle : `${middle} (${low} … ${high})`
}

/** Rounds to `digits` significant digits: JSON need not have more digits than were measured. */
export function rounded(value: number, digits = 4): number {
  return Number(value.toPrecision(digits))
}
