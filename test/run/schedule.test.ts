import t from 'tap'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { Schedule, type StepValues } from '../../src/run/schedule.js'

const groupsOf = (lr: number) =>
  new Map([
    ['a', parseGroup({ name: 'a', algorithm: 'sgd', lr })],
    ['b', parseGroup({ name: 'b', algorithm: 'adamw' })],
  ])
const lrOf = (schedule: Schedule) => schedule.current.groups.get('a')!.hyperparameters.lr
const NONE = new Map()
const say = (lr: number, gradient_scale = 1) => ({ groups: { a: { lr } }, gradient_scale, max_logits: NONE })

t.test('what a step frame sets holds from that step on, its gradient_scale for that step only', async (t) => {
  const schedule = new Schedule(groupsOf(1))
  schedule.set(say(2, 0.5), 1)
  t.equal(schedule.current.gradient_scale, 0.5)
  schedule.finish()
  t.equal(schedule.last?.gradient_scale, 0.5)
  t.equal(schedule.current.gradient_scale, 1)
  t.equal(lrOf(schedule), 2)
  schedule.set({ groups: { b: { lr: 3 } }, gradient_scale: 1, max_logits: NONE }, 2)
  t.equal(lrOf(schedule), 2)
})

t.test('a step frame said again must be identical; one after the first gradient must say nothing new', async (t) => {
  const schedule = new Schedule(groupsOf(1))
  schedule.set(say(2), 1)
  schedule.set(say(2), 1)
  t.throws(() => schedule.set(say(3), 1), { code: 'STEP_CONFLICT', fields: { step: 1 } })
  t.throws(() => schedule.set(say(2, 2), 1), { code: 'STEP_CONFLICT' })
  t.equal(lrOf(schedule), 2)
  schedule.begin()
  schedule.set(say(2), 1)
  schedule.finish()
  schedule.begin()
  schedule.set({ groups: {}, gradient_scale: 1, max_logits: NONE }, 2)
  t.throws(() => schedule.set(say(5), 2), { code: 'STEP_CONFLICT' })
  t.equal(lrOf(schedule), 2)
})

t.test('a refused step frame changes nothing, and another one may follow', async (t) => {
  const schedule = new Schedule(groupsOf(1))
  const refused: StepValues[] = [
    { groups: { a: { lr: 2 }, c: {} }, gradient_scale: 1, max_logits: NONE },
    { groups: { a: { lr: 2 }, b: { lr: -1 } }, gradient_scale: 1, max_logits: NONE },
    { groups: { a: { lr: 2 } }, gradient_scale: Infinity, max_logits: NONE },
  ]
  for (const values of refused) t.throws(() => schedule.set(values, 1), { code: 'HYPERPARAMETER_INVALID' })
  t.equal(lrOf(schedule), 1)
  schedule.set(say(4), 1)
  t.equal(lrOf(schedule), 4)
})

t.test('max_logits hold for one step only, and belong to what must be said again alike', async (t) => {
  const schedule = new Schedule(groupsOf(1))
  const values = (logits: number[]) => ({ ...say(2), max_logits: new Map([['h', logits]]) })
  schedule.set(values([1, 200]), 1)
  schedule.set(values([1, 200]), 1)
  t.throws(() => schedule.set(values([1, 201]), 1), { code: 'STEP_CONFLICT' })
  t.throws(() => schedule.set(say(2), 1), { code: 'STEP_CONFLICT' })
  schedule.finish()
  t.same(schedule.last?.frame.max_logits, values([1, 200]).max_logits)
  t.same(schedule.current.frame.max_logits, new Map())
})

t.test('what was forgotten was never said', async (t) => {
  const schedule = new Schedule(groupsOf(1))
  schedule.set(say(2, 0.5), 1)
  schedule.begin()
  schedule.forget()
  t.equal(lrOf(schedule), 1)
  t.equal(schedule.current.gradient_scale, 1)
  schedule.set(say(3), 1)
  t.equal(lrOf(schedule), 3)
})

t.test('replaced groups hold at once for an untouched step, otherwise from the next one', async (t) => {
  const untouched = new Schedule(groupsOf(1))
  untouched.set(say(2), 1)
  untouched.replace(groupsOf(7), true)
  t.equal(lrOf(untouched), 7)
  untouched.finish()
  t.equal(lrOf(untouched), 7)

  const touched = new Schedule(groupsOf(1))
  touched.set(say(2), 1)
  touched.begin()
  touched.replace(groupsOf(7), false)
  t.equal(lrOf(touched), 2)
  touched.finish()
  t.equal(touched.last?.groups.get('a')?.hyperparameters.lr, 2)
  t.equal(lrOf(touched), 7)
  touched.finish()
  t.equal(lrOf(touched), 7)
})
