import fc from 'fast-check'
import t from 'tap'
import { History, type Receipt } from '../../src/run/history.js'
import type { Measured } from '../../src/run/step/measured.js'

const GROUPS = { g: { algorithm: 'sgd', lr: 1 } }
const receipt = (step: number, groups: Receipt['groups'] = GROUPS): Receipt => ({
  type: 'receipt',
  step,
  replayed: false,
  applied: 0,
  skipped: 0,
  gradient_norm: 0,
  groups,
  clipped_heads: {},
  digest: String(step),
  durable: false,
  seconds: { receive: 0, queue: 0, compute: 0, send: 0 },
})
const manyGroups = (lr: number) =>
  Object.fromEntries(Array.from({ length: 1000 }, (_, i) => [`group-${i}`, { algorithm: 'sgd', lr }]))
const steps = (history: History) => history.receipts(0).map(({ receipt }) => receipt.step)

t.test('receipts are kept by their number and by their bytes; unchanged groups weigh nothing', async (t) => {
  const history = new History({ receipts_kept: 100, receipts_bytes: 400_000 })
  const shared = manyGroups(1)
  for (let step = 1; step <= 90; step += 1) history.add(receipt(step, shared))
  t.equal(steps(history).length, 90)
  for (let step = 91; step <= 200; step += 1) history.add(receipt(step, manyGroups(step)))
  t.same(steps(history), [197, 198, 199, 200], 'each of these repeats a thousand groups')
  const tight = new History({ receipts_kept: 100, receipts_bytes: 1 })
  for (const step of [1, 2]) tight.add(receipt(step))
  t.same(steps(tight), [2], 'the newest one is kept, however heavy it is')
})

t.test('whatever is added, acknowledged and gone back to: the newest receipts, within both limits', async (t) => {
  const action = fc.oneof(
    fc.record({ kind: fc.constant('add' as const), heavy: fc.boolean() }),
    fc.record({ kind: fc.constant('acknowledge' as const) }),
    fc.record({ kind: fc.constant('restore' as const), back: fc.nat(5) }),
  )
  const property = fc.property(fc.array(action, { maxLength: 60 }), (actions) => {
    const history = new History({ receipts_kept: 7, receipts_bytes: 300_000 })
    let expected: number[] = []
    for (const one of actions) {
      const { step } = history
      if (one.kind === 'add') {
        history.add(receipt(step + 1, one.heavy ? manyGroups(step) : GROUPS))
        expected = [...expected, step + 1].slice(-7)
      } else if (one.kind === 'acknowledge' && step > 0 && history.last) {
        history.acknowledge({ ...receipt(step), durable: true })
        if (!history.last.durable) return false
      } else if (one.kind === 'restore' && step > one.back) {
        const to = step - one.back
        const record = { step: to, digest: String(to), previous_digest: '', receipt: receipt(to) }
        history.restore(record as Parameters<History['restore']>[0])
        expected = [...expected.filter((known) => known < to), to].slice(-7)
      }
      const kept = steps(history)
      if (kept.join() !== expected.slice(-kept.length || expected.length).join()) return false
      if (history.step > 0 && kept.at(-1) !== history.step) return false
    }
    return true
  })
  t.doesNotThrow(() => fc.assert(property, { seed: 11, numRuns: 300 }))
})

t.test('the pace is that of the newest steps of this process', async (t) => {
  const history = new History({ receipts_kept: 100, receipts_bytes: 1_000_000 })
  const measured = (wall_seconds: number): Measured => ({
    ...{ finished_at: `at ${wall_seconds}`, wall_seconds },
    ...{ update_rms: 0, gradient_bytes: 0, update_bytes: 0 },
  })
  t.equal(history.pace, undefined)
  t.equal(history.finishedAt, undefined)
  for (let step = 1; step <= 30; step += 1) history.add(receipt(step), measured(step))
  t.same(history.pace, { last_step_at: 'at 30', step_seconds: 20.5 }, 'the mean of 11 to 30')
  t.type(history.finishedAt, 'number')
  history.acknowledge(receipt(30))
  t.same(history.pace, { last_step_at: 'at 29', step_seconds: 20 }, 'another process has finished step 30')
  t.equal(history.finishedAt, undefined)
})
