import { figure, type Plot, type Series } from '../plot/plot.js'
import { shorten } from '../text-table.js'
import type { Replay } from './replay.js'
import type { RowStep } from './rows.js'
import type { Spike } from './spikes.js'

/** Twelve colours that are told apart on white, also side by side; a thirteenth row has the first one again. */
const COLOURS = [
  ...['#1f77b4', '#d62728', '#2ca02c', '#9467bd', '#ff7f0e', '#17becf'],
  ...['#8c564b', '#e377c2', '#7f7f7f', '#bcbd22', '#1b2a6b', '#006d4f'],
]
const HEIGHT = 260
const NAME_CHARACTERS = 40
/** Of many steps a line has the median of each of so many parts, and a bar the range. */
const PARTS = 60

type Point = readonly [step: number, value: number]
type Panel = { title: string; yLabel: string; isLinear?: boolean; of: (step: RowStep) => (number | undefined)[] }

const PANELS: readonly Panel[] = [
  { title: 'Gradient norm', yLabel: 'L2 norm', of: ({ gradient_norm }) => [gradient_norm] },
  {
    title: 'Update norm',
    yLabel: 'L2 norm of scale · data',
    of: ({ update_norm, alternative }) => [update_norm, alternative?.update_norm],
  },
  {
    title: 'Update RMS',
    yLabel: 'RMS of scale · data',
    of: ({ update_rms, alternative }) => [update_rms, alternative?.update_rms],
  },
  {
    title: 'Cosine of the other update to the one that was applied',
    yLabel: 'cosine',
    isLinear: true,
    of: ({ alternative }) => [alternative?.cosine],
  },
]

/**
 * A replay as an SVG document: norms, update RMS and, with an alternative, the cosine, over the steps, a line for each
 * row. What the alternative makes is dashed. Undefined where there is nothing to draw.
 */
export function chartOf(replay: Replay, spikes: readonly Spike[]): string | undefined {
  const { rows, steps } = replay
  const hasOther = rows.some(({ alternative }) => alternative)
  const plots = PANELS.flatMap((panel) => {
    const series = rows.flatMap((_, i) => linesOf(replay, i, panel))
    return series.length > 0 ? [plotOf(panel, series, { hasOther, steps: steps.length })] : []
  })
  const [first, ...others] = plots
  if (!first) return undefined
  const span: [number, number] = [steps[0].step, steps[steps.length - 1].step]
  const verticals = [...new Set(spikes.map(({ step }) => step))].map((step) => ({ x: step, text: `step ${step}` }))
  return figure([
    { ...first, span, verticals, legend: 'line', height: HEIGHT + 40 },
    ...others.map((plot): Plot => ({ ...plot, span, legend: 'none', height: HEIGHT })),
  ])
}

function plotOf(
  { title, yLabel, isLinear }: Panel,
  series: readonly Series[],
  { hasOther, steps }: { hasOther: boolean; steps: number },
): Plot {
  const isDashed = series.some(({ dashed }) => dashed)
  const isThinned = series.some(({ spread }) => spread)
  const says = hasOther && isDashed ? ': solid as it was applied, dashed by the other groups' : ''
  const xLabel = isThinned ? `step; lines are medians of ${Math.round(steps / PARTS)} steps, bars their range` : 'step'
  return { title: title + says, xLabel, yLabel, series, logarithmic: isLinear ? [] : ['y'] }
}

/** The lines of a row in a panel: that of the run, and that of the alternative. */
function linesOf({ rows, steps }: Replay, at: number, { of, isLinear }: Panel): Series[] {
  const values = steps.flatMap(({ step, rows: all }) => {
    const value = all[at]
    return value ? [{ step, values: of(value) }] : []
  })
  return [false, true].flatMap((dashed) => {
    const points = values.flatMap(({ step, values: [own, other] }): Point[] => {
      const value = dashed ? other : own
      // A logarithmic axis has no 0.
      return value === undefined || (!isLinear && value === 0) ? [] : [[step, value]]
    })
    const name = shorten(rows[at].name, NAME_CHARACTERS)
    const line = { name, colour: COLOURS[at % COLOURS.length], ...thinned(points), width: 1.5, dashed }
    return points.length > 0 ? [line] : []
  })
}

/** Points as they are drawn: few of them themselves, of many the median of each part, and the range beside it. */
export function thinned(points: readonly Point[]): Pick<Series, 'points' | 'spread'> {
  if (points.length <= 2 * PARTS) return { points }
  const parts = Array.from({ length: PARTS }, (_, i) => {
    const part = points.slice(Math.floor((i * points.length) / PARTS), Math.floor(((i + 1) * points.length) / PARTS))
    const sorted = part.map(([, value]) => value).sort((one, other) => one - other)
    const middle = Math.floor(part.length / 2)
    return { step: part[middle][0], median: sorted[middle], least: sorted[0], most: sorted[sorted.length - 1] }
  })
  return {
    points: parts.map(({ step, median }) => [step, median]),
    spread: parts.map(({ step, least, most }) => [step, least, most]),
  }
}
