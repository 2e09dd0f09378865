import t from 'tap'
import { updateRms } from '../../examples/update-rms.js'
import { cellsOf, stageWithNotes } from './stage.js'

/** docs/algorithms.md, muon, step 3. */
const FACTORS: Record<string, (rows: number, cols: number) => number> = {
  original: (rows, cols) => Math.sqrt(Math.max(1, rows / cols)),
  match_rms_adamw: (rows, cols) => 0.2 * Math.sqrt(Math.max(rows, cols)),
  'rms:0.18': (rows, cols) => 0.18 * Math.sqrt(Math.max(rows, cols)),
  spectral: (rows, cols) => Math.sqrt(rows / cols),
  none: () => 1,
}

t.test('update RMS', async (t) => {
  const { stage, notes } = stageWithNotes()
  const results = await updateRms.measure(stage, updateRms.sizes.quick)
  t.test('each adjustment gives its factor times the orthogonalized matrix', (t) => {
    t.equal(results.rows.length, 3)
    for (const { shape, rms } of results.rows) {
      // Singular values of 0.7 to 1.2 in a matrix of full rank.
      const expected = Math.sqrt(Math.min(...shape) / (shape[0] * shape[1]))
      const settled = rms['match_rms_adamw, 12 iterations']! / FACTORS.match_rms_adamw!(...shape)
      t.ok(settled > 0.8 * expected && settled < 1.1 * expected, `${shape}: ${settled}`)
      t.ok(rms.none! > 0.68 * expected && rms.none! < 1.21 * expected, `${shape}: ${rms.none}`)
      for (const [name, factor] of Object.entries(FACTORS)) {
        const ratio = rms[name]! / rms.none! / factor(...shape)
        t.ok(Math.abs(ratio - 1) < 2e-3, `${name}, ${shape}: ${ratio}`)
      }
    }
    t.end()
  })
  t.test('AdamW has learned from the same gradients', (t) => {
    for (const { rms } of results.rows) t.ok(rms.AdamW! > 0.05 && rms.AdamW! < 1, `${rms.AdamW}`)
    const losses = notes.map((note) => Number(/loss (.*),/.exec(note)![1]))
    t.ok(losses.at(-1)! < losses[0]!, losses.join(' '))
    t.equal(notes.length, updateRms.sizes.quick.steps)
    t.end()
  })
  t.test('the table has a row for each shape, the picture a dot for each figure', (t) => {
    const [head, ...rows] = cellsOf(updateRms.table(results))
    t.same(head!.slice(0, 3), ['shape', 'matrices', 'AdamW'])
    t.same(
      rows.map((row) => row.slice(0, 2)),
      [
        ['32 x 32', '10'],
        ['128 x 32', '1'],
        ['32 x 128', '1'],
      ],
    )
    t.equal(rows[1]![4], results.rows[1]!.rms.match_rms_adamw!.toFixed(3))
    const [plot] = updateRms.plots(results)
    t.same(plot!.series[2]!.points[1], [1, results.rows[1]!.rms.match_rms_adamw])
    t.end()
  })
})
