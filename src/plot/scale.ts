/** An axis: the place of a value in pixels, the values that have marks, and their text. */
export type Scale = {
  place: (value: number) => number
  ticks: readonly number[]
  label: (tick: number) => string
}

const TICKS = 6

// An axis of powers of ten that is shorter than this many of them has marks between them too.
const FEW_POWERS = 3

/**
 * A linear axis from one tick to another; ticks are 1, 2 or 5 times a power of ten apart, so that readers can divide.
 */
export function scale(values: readonly number[], [from, to]: [number, number]): Scale {
  const [low, high] = extent(values)
  const step = tickStep((high - low) / TICKS)
  const first = Math.floor(low / step + 1e-9)
  const last = Math.ceil(high / step - 1e-9)
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9))
  return {
    place: (value) => from + ((value / step - first) / (last - first)) * (to - from),
    ticks: Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step),
    label: (tick) => tick.toFixed(digits),
  }
}

/** A logarithmic axis from one tick to another; ticks are powers of ten, and on a short axis 2 and 5 times them too. */
export function logScale(values: readonly number[], [from, to]: [number, number]): Scale {
  const [low, high] = [Math.min(...values), Math.max(...values)]
  const factors = high / low > 10 ** FEW_POWERS ? [1] : [1, 2, 5]
  const ladder = Array.from({ length: Math.ceil(Math.log10(high / low)) + 3 }, (_, i) => {
    const power = Math.floor(Math.log10(low)) + i
    return factors.map((factor) => Number(`${factor}e${power}`))
  }).flat()
  const first = ladder.findLastIndex((tick) => tick <= low)
  const ticks = ladder.slice(first, ladder.findIndex((tick, i) => i > first && tick >= high) + 1)
  const span = Math.log(ticks[ticks.length - 1] / ticks[0])
  return { place: (value) => from + (Math.log(value / ticks[0]) / span) * (to - from), ticks, label: powerText }
}

/** `0.001`, and `1e-4`: the width of a figure's margin has room for so many zeros. */
function powerText(tick: number): string {
  return tick < 1e-3 || tick >= 1e6 ? tick.toExponential().replace('+', '') : String(tick)
}

/** An axis of names; a value is an index into them, and stands in the middle of its share of the axis. */
export function nameScale(names: readonly string[], [from, to]: [number, number]): Scale {
  return {
    place: (value) => from + ((value + 0.5) / names.length) * (to - from),
    ticks: [...names.keys()],
    label: (tick) => names[tick],
  }
}

function extent(values: readonly number[]): [number, number] {
  const low = Math.min(...values)
  const high = Math.max(...values)
  return low === high ? [low - 0.5, high + 0.5] : [low, high]
}

function tickStep(rough: number): number {
  const power = 10 ** Math.floor(Math.log10(rough))
  return power * ([1, 2, 5].find((factor) => factor * power >= rough * (1 - 1e-9)) ?? 10)
}
