import t from 'tap'
import { chartOf, thinned } from '../../src/replay/chart.js'
import type { Replay } from '../../src/replay/replay.js'
import type { RowStep } from '../../src/replay/rows.js'
import type { Spike } from '../../src/replay/spikes.js'
import { gaussian } from '../reference.js'

const MOST_BYTES = 150_000

/** A replay of so many groups and steps, as large as one may be; one row in three is in no other group. */
function replayOf(groups: number, steps: number): Replay {
  const rows = Array.from({ length: groups }, (_, i) => ({
    ...{ name: `model.layers.${i}.attention.projection`, group: `g${i}`, algorithm: 'muon', parameters: [] },
    ...(i % 3 > 0 && { alternative: { group: 'adam', algorithm: 'adamw', begins: 'state' as const } }),
  }))
  const noise = rows.map((_, i) => gaussian(i, steps))
  const stepOf = (row: number, at: number): RowStep => {
    const gradient_norm = Math.exp(row / 4 + 0.2 * noise[row]![at]!)
    const size = { update_norm: gradient_norm, update_rms: gradient_norm / 30 }
    const other = { lr: 1, update_norm: 1 + row, update_rms: 0.1 + row, ratio: 1, cosine: Math.tanh(noise[row]![at]!) }
    const own = { lr: 1, gradient_norm, ...size, largest: { parameter: 'p', gradient_norm } }
    return rows[row]!.alternative ? { ...own, alternative: other } : own
  }
  return {
    rows,
    difference: undefined,
    steps: Array.from({ length: steps }, (_, at) => ({
      step: at + 1,
      digest: '',
      rows: rows.map((_, i) => stepOf(i, at)),
    })),
  }
}

const spike = (step: number): Spike => ({
  ...{ row: 'g', step, last_step: step, gradient_norm: 9, peak: 9, median: 1, bound: 2, parameter: 'p' },
})

t.test('the picture of 12 groups and 2,000 steps is small, and has every part once', async (t) => {
  const svg = chartOf(replayOf(12, 2000), [700, 701, 720, 1500, 1995].map(spike))!
  t.ok(svg.length < MOST_BYTES, `${svg.length} bytes, at most ${MOST_BYTES}`)
  const count = (what: string) => svg.split(what).length - 1
  for (const title of ['Gradient norm', 'Update norm', 'Update RMS', 'Cosine of the other update'])
    t.equal(count(`>${title}`), 1)
  // 12 rows in three panels, 8 with another group in three.
  t.equal(count('<polyline'), 12 * 3 + 8 * 3)
  t.equal(count('<path'), 12 * 3 + 8 * 3)
  t.match(svg, '>step; lines are medians of 33 steps, bars their range<')
  t.equal(count('>model.layers.0.attention.projection<'), 1, 'one legend for all panels')
  t.same(
    [...svg.matchAll(/>step (\d+)</g)].map(([, step]) => step),
    ['700', '1500', '1995'],
    'no text over another',
  )
})

t.test('what is nothing, or 0 on a logarithmic axis, is not drawn', async (t) => {
  t.equal(chartOf(replayOf(2, 0), []), undefined)
  const { rows, steps } = replayOf(1, 3)
  const silent = steps.map((step) => ({
    ...step,
    rows: step.rows.map((row) => row && { ...row, update_norm: 0, update_rms: 0 }),
  }))
  const svg = chartOf({ rows, steps: silent, difference: undefined }, [])!
  t.match(svg, 'Gradient norm')
  t.notMatch(svg, 'Update')
})

t.test('thinned lines are medians, and no peak is lost beside them', async (t) => {
  const points = Array.from({ length: 1000 }, (_, i) => [i, i === 777 ? 50 : i === 333 ? -50 : i % 3] as const)
  const { points: medians, spread } = thinned(points)
  t.equal(medians.length, 60)
  t.ok(medians.every(([, value]) => value === 1))
  t.same(spread!.filter(([, least]) => least === -50).length, 1)
  t.same(spread!.filter(([, , most]) => most === 50).length, 1)
  t.same(thinned(points.slice(0, 120)), { points: points.slice(0, 120) })
})
