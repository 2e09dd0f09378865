import t from 'tap'
import { qkClip } from '../../examples/qk-clip.js'
import { figure } from '../../src/plot/plot.js'
import { cellsOf, stageWithNotes } from './stage.js'

t.test('QK-clip', async (t) => {
  const { stage, notes } = stageWithNotes()
  const { threshold, steps } = qkClip.sizes.quick
  const results = await qkClip.measure(stage, qkClip.sizes.quick)
  const [plain, , clipped] = results.drawn as [Drawn, Drawn, Drawn]
  t.test('the service clips exactly the heads above the threshold', (t) => {
    const above = clipped.logits.map((heads) => heads.filter((logit) => logit > threshold).length)
    t.same(clipped.clippedHeads, above)
    t.ok(above.some((count) => count > 0))
    t.same(
      plain.clippedHeads,
      above.map(() => 0),
    )
    t.end()
  })
  t.test('up to the first clip MuonClip is Muon, and then its logits stay smaller', (t) => {
    const first = clipped.clippedHeads.findIndex((count) => count > 0)
    for (let step = 0; step <= first; step++) {
      for (const [head, logit] of clipped.logits[step]!.entries()) {
        t.ok(Math.abs(logit / plain.logits[step]![head]! - 1) < 1e-2, `step ${step + 1}, head ${head}`)
      }
    }
    const late = (run: Drawn) => Math.max(...run.logits.slice(-steps / 4).flat())
    t.ok(late(clipped) < late(plain), `${late(clipped)} and ${late(plain)}`)
    t.end()
  })
  t.test('every step of every run is told', (t) => {
    t.equal(notes.length, 3 * steps)
    t.match(notes.at(-1), /^qk-clip 36\/36 loss \d\.\d{3}, MuonClip, seed 1$/)
    t.end()
  })
  t.test('the table has the seeds of each recipe together', (t) => {
    const summary = {
      title: 'MuonClip',
      seed: 1,
      loss: 2,
      peakLogit: 110,
      lateLogit: 100,
      clippedSteps: 30,
      lastClipped: 35,
    }
    const other = { ...summary, seed: 2, loss: 2.5, peakLogit: 130, lastClipped: 37 }
    const summaries = [...['Muon', 'Muon, weight decay 0.1'].map((title) => ({ ...summary, title })), summary, other]
    const [, , , cells] = cellsOf(qkClip.table({ ...results, summaries }))
    t.same(cells, ['MuonClip', '2.250 (2.000 … 2.500)', '120 (110 … 130)', '100', '30', '36 (35 … 37)'])
    t.end()
  })
  t.test('γ of a clipped head is the threshold over its logit, and others have no dot', (t) => {
    const { series, span } = qkClip.plots(results)[2]!
    t.same(span, [1, steps])
    t.same(
      series.map(({ name }) => name),
      ['layer 0, head 0', 'layer 0, head 1', 'layer 1, head 0', 'layer 1, head 1'],
    )
    for (const [head, { points }] of series.entries()) {
      const expected = clipped.logits.map((heads, i) => [i + 1, Math.min(1, threshold / heads[head]!)])
      t.same(
        points,
        expected.filter(([, gamma]) => gamma! < 1),
      )
    }
    t.end()
  })
  t.test('a run that nothing was clipped of has its picture too', (t) => {
    const calm = { ...clipped, logits: clipped.logits.map((heads) => heads.map(() => 1)) }
    const plots = qkClip.plots({ ...results, drawn: [plain, plain, calm] })
    t.notMatch(figure(plots), /NaN|Infinity/)
    t.end()
  })
})

type Drawn = Awaited<ReturnType<typeof qkClip.measure>>['drawn'][number]
