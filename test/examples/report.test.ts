import t from 'tap'
import { best, comparison, conclusion, sweepTable } from '../../examples/report.js'
import { adamw, muon, type Outcome, type Recipe } from '../../examples/train.js'

function outcome(recipe: Recipe, losses: number[]): Outcome {
  return {
    recipe,
    curve: losses.map((loss, i) => ({ step: 10 * i, seconds: 2 * i, loss })),
    trace: [],
    updateRms: { hidden: 0.0625, rest: 0.25 },
    milliseconds: { model: 12.3, service: 4.56 },
  }
}

const BASELINE = outcome(adamw(0.004), [5, 3, 2])
const FASTER = outcome(muon(0.02, 0.004), [5, 2, 1.5])
const SLOWER = outcome(muon(0.08, 0.004), [5, 4, 2.5])

const row = (table: string, start: string) =>
  table
    .split('\n')
    .find((line) => line.startsWith(start))
    ?.slice(start.length)
    .trim()
    .split(/ {3,}/)

t.test('the comparison says when each run reached the final loss of the first', (t) => {
  const table = comparison([BASELINE, FASTER, SLOWER])
  t.same(row(table, 'final validation loss, nats per byte'), ['2.0000', '1.5000', '2.5000'])
  t.same(row(table, "steps to AdamW's final loss"), ['20', '10', 'never'])
  t.same(row(table, "seconds to AdamW's final loss"), ['4.0', '2.0', 'never'])
  t.same(row(table, 'update RMS, hidden matrices'), ['0.063', '0.063', '0.063'])
  t.end()
})

t.test(
  'the conclusion says after how many steps the second run came to the final loss of the first, if it did',
  (t) => {
    t.equal(conclusion([BASELINE, FASTER]), "Muon + AdamW came to AdamW's final loss after 10 of 20 steps.")
    t.equal(conclusion([BASELINE, SLOWER]), "Muon + AdamW did not come to AdamW's final loss in 20 steps.")
    t.end()
  },
)

t.test('the best of a sweep has the lowest final loss', (t) => {
  t.equal(best([BASELINE, FASTER, SLOWER]), FASTER)
  t.equal(best([FASTER, BASELINE]), FASTER)
  t.end()
})

t.test('a sweep is a Markdown table', (t) => {
  t.same(sweepTable([BASELINE, FASTER]).split('\n'), [
    '| optimizer    | lr, hidden matrices | lr, the rest | final validation loss |',
    '|--------------|---------------------|--------------|-----------------------|',
    '| AdamW        | 0.004               | 0.004        | 2.0000                |',
    '| Muon + AdamW | 0.02                | 0.004        | 1.5000                |',
  ])
  t.end()
})
