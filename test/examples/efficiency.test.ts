import t from 'tap'
import { efficiency } from '../../examples/efficiency.js'
import { cellsOf, stageWithNotes } from './stage.js'

t.test('efficiency', async (t) => {
  const { stage, notes } = stageWithNotes()
  const { quick } = efficiency.sizes
  const results = await efficiency.measure(stage, quick)
  t.test('every rate is tried, and the best of each optimizer runs with every seed', (t) => {
    t.equal(results.sweep.length, 10)
    t.equal(results.runs.length, 10)
    t.equal(notes.length, 20 * quick.steps)
    t.match(notes.at(-1), /^efficiency 200\/200 loss \d\.\d{3}, muonclip 0\.0\d, seed 3$/)
    for (const { optimizer, lr } of results.runs) {
      const tried = results.sweep.filter((one) => one.optimizer === optimizer)
      t.equal(lr, tried.toSorted((a, b) => a.loss - b.loss)[0]!.lr)
    }
    t.end()
  })
  t.test('a seed is one start for all', (t) => {
    for (const seed of quick.seeds) {
      const starts = results.runs.filter((run) => run.seed === seed).map(({ curve }) => curve[0]!.loss)
      t.same(new Set(starts).size, 1)
    }
    t.end()
  })
  t.test('a rate that moves nothing is not chosen', (t) => {
    t.same(new Set(results.runs.filter(({ optimizer }) => optimizer === 'sgd').map(({ lr }) => lr)), new Set([0.1]))
    t.end()
  })
})

t.test('steps and seconds are to the loss that AdamW ends with, seed by seed', (t) => {
  const run = (optimizer: Run['optimizer'], seed: number, losses: number[]): Run => {
    const curve = losses.map((loss, i) => ({ step: 10 * i, seconds: 2 * i, loss }))
    return { optimizer, seed, lr: 0.01, curve, logit: 50 }
  }
  const runs = [1, 2].flatMap((seed) => [
    run('sgd', seed, [5, 4, 4, 4]),
    run('adam', seed, [5, 4, 3, seed === 1 ? 2 : 3]),
    run('adamw', seed, [5, 4, 3, 2 + seed / 10]),
    run('muon', seed, [5, seed === 1 ? 2 : 3, 2, 1]),
    run('muonclip', seed, [5, 3, 2, 1]),
  ])
  const sweep = (['sgd', 'adam', 'adamw', 'muon', 'muonclip'] as const).flatMap((optimizer) => [
    { optimizer, lr: 0.01, loss: 2 },
    { optimizer, lr: 0.02, loss: 3 },
  ])
  const results = { settings: efficiency.sizes.quick, sweep, runs }
  const [first, second] = efficiency.table(results).split('\n\n') as [string, string]
  t.same(cellsOf(first).slice(1), [
    ['SGD', '0.01', '4.000', '0 of 2 runs', '0 of 2 runs', '0 of 2 runs', '50'],
    ['Adam', '0.01', '2.500 (2.000 … 3.000)', '1 of 2 runs', '1 of 2 runs', '1 of 2 runs', '50'],
    ['AdamW', '0.01', '2.150 (2.100 … 2.200)', '30', '6.0', '1.00', '50'],
    ['Muon', '0.01', '1.000', '15 (10 … 20)', '3.0 (2.0 … 4.0)', '0.50 (0.33 … 0.67)', '50'],
    ['MuonClip', '0.01', '1.000', '20', '4.0', '0.67', '50'],
  ])
  t.same(cellsOf(second)[3], ['AdamW', '**2.000 at 0.01**', '3.000 at 0.02'])
  const [overSteps, overSeconds] = efficiency.plots(results)
  t.same(overSteps!.series[8]!.points, [
    [20, 2],
    [30, 1],
  ])
  t.same(overSeconds!.series[8]!.points[0], [4, 2])
  t.same(overSteps!.marks, [{ y: (2.1 + 2.2) / 2, text: "AdamW's final loss" }])
  t.end()
})

type Run = Parameters<typeof efficiency.table>[0]['runs'][number]
