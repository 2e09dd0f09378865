import t from 'tap'
import { overhead } from '../../examples/overhead.js'
import { transformerFlops } from '../../examples/transformer.js'
import { cellsOf, stageWithNotes } from './stage.js'

t.test('overhead', async (t) => {
  const { stage, notes } = stageWithNotes()
  const results = await overhead.measure(stage, overhead.sizes.quick)
  t.test('every model of the grid is measured', (t) => {
    t.same(
      results.rows.map(({ width, tokens, formula }) => [width, tokens, formula]),
      [
        [32, 64, 2.5],
        [32, 128, 1.25],
        [64, 64, 5],
      ],
    )
    for (const { seconds } of results.rows) {
      t.ok(
        Object.values(seconds).every((value) => value > 0 && value < 60),
        JSON.stringify(seconds),
      )
      t.ok(seconds.step > seconds.optimizer, 'the trainer waits for more than the computing')
    }
    t.match(notes.at(-1), /overhead 12\/12 \d+ ms, width 64, 64 tokens/)
    t.end()
  })
  t.test('operations are those of the products, and within the formula', (t) => {
    const [{ flops, formula }] = results.rows as [(typeof results.rows)[number]]
    // Width 32: four square matrices, and two of 32 x 128; five iterations of 4m²n + 2m³.
    t.equal(flops.optimizer, 5 * (4 * 6 * 32 ** 3 + 2 * (16 + 2) * 32 ** 3))
    t.equal(flops.model, transformerFlops({ context: 32, width: 32, heads: 2, mlp: [128] }, 2))
    t.ok(flops.optimizer / flops.model < formula)
    t.end()
  })
  t.test('shares are of forward and backward', (t) => {
    const row = { ...results.rows[0]!, flops: { model: 400, optimizer: 3 }, formula: 0.025 }
    const seconds = { model: 0.2, optimizer: 0.003, step: 0.0345 }
    const [, cells] = cellsOf(overhead.table({ ...results, rows: [{ ...row, seconds }] }))
    t.same(cells, ['32', '64', '2.5 %', '0.75 %', '1.5 %', '17.3 %', '200.0', '3.0', '34.5'])
    const [plot] = overhead.plots({ ...results, rows: [{ ...row, seconds }] })
    t.same(
      plot!.series.map(({ points }) => points[0]),
      [
        [0.025, 0.025],
        [0.025, 3 / 400],
        [0.025, 0.003 / 0.2],
        [0.025, 0.0345 / 0.2],
      ],
    )
    t.end()
  })
})
