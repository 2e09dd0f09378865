import type { ReplayedStep } from './replay.js'
import type { Row } from './rows.js'

/**
 * Steps in a row whose gradients left the band of those before them. `parameter` has the largest gradient of the first
 * of them; `median` is of the steps before that one, and `bound` the end of its band.
 */
export type Spike = {
  readonly row: string
  readonly step: number
  readonly last_step: number
  readonly gradient_norm: number
  readonly peak: number
  readonly median: number
  readonly bound: number
  readonly parameter: string
}

/** The band is that of so many steps before, and there is none before so many. */
export const WINDOW_STEPS = 64
export const LEAST_STEPS = 16
/** Its width in standard deviations, and the least that it has as a factor: quiet gradients have a narrow band. */
export const WIDTH_DEVIATIONS = 6
export const LEAST_FACTOR = 2
/** The standard deviation of normal numbers over their median absolute deviation, 1 / Φ⁻¹(3/4). */
const DEVIATION = 1.4826

type Point = { readonly step: number; readonly gradient_norm: number; readonly parameter: string }

/**
 * The steps at which the gradient norm of a row left its band, the first ones first. With x = ln ‖G‖, over the 64 steps
 * before (no fewer than 16), and s = 1.4826 · median |x - median x|, the band ends at median x + max(6 s, ln 2). Median
 * and MAD are of the logarithm, since norms differ by factors, and have no more to do with a single spike than with
 * any other step. Gradients that are all zero count for nothing.
 */
export function spikesOf(rows: readonly Row[], steps: readonly ReplayedStep[]): Spike[] {
  const all = rows.flatMap(({ name }, i) => {
    const points = steps.flatMap(({ step, rows: values }): Point[] => {
      const value = values[i]
      if (!value || value.gradient_norm === 0) return []
      return [{ step, gradient_norm: value.gradient_norm, parameter: value.largest.parameter }]
    })
    return spikesIn(name, points)
  })
  return all.sort((one, other) => one.step - other.step)
}

function spikesIn(row: string, points: readonly Point[]): Spike[] {
  const spikes: Spike[] = []
  let isOutside = false
  for (const [i, { step, gradient_norm, parameter }] of points.entries()) {
    const { median, bound } = bandBefore(points, i)
    const wasOutside = isOutside
    isOutside = gradient_norm > bound
    if (!isOutside) continue
    if (!wasOutside) {
      spikes.push({ ...{ row, step, last_step: step, gradient_norm, peak: gradient_norm }, median, bound, parameter })
      continue
    }
    const last = spikes[spikes.length - 1]
    spikes[spikes.length - 1] = { ...last, last_step: step, peak: Math.max(last.peak, gradient_norm) }
  }
  return spikes
}

/** The band of the points before one; it has no end where there are too few. */
function bandBefore(points: readonly Point[], at: number): { median: number; bound: number } {
  if (at < LEAST_STEPS) return { median: 0, bound: Infinity }
  const before = points.slice(Math.max(0, at - WINDOW_STEPS), at).map(({ gradient_norm }) => Math.log(gradient_norm))
  const median = medianOf(before)
  const deviation = DEVIATION * medianOf(before.map((value) => Math.abs(value - median)))
  const width = Math.max(WIDTH_DEVIATIONS * deviation, Math.log(LEAST_FACTOR))
  return { median: Math.exp(median), bound: Math.exp(median + width) }
}

function medianOf(values: readonly number[]): number {
  const sorted = values.toSorted((one, other) => one - other)
  const half = Math.floor(sorted.length / 2)
  return sorted.length % 2 === 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2
}
