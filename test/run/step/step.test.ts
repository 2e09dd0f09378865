import fc from 'fast-check'
import t from 'tap'
import { parseGroup } from '../../../src/optimizer/hyperparameters.js'
import { Member } from '../../../src/run/members/member.js'
import { Step, type StepValues } from '../../../src/run/step/step.js'

const groupsOf = (lr: number) =>
  new Map([
    ['a', parseGroup({ name: 'a', algorithm: 'sgd', lr })],
    ['b', parseGroup({ name: 'b', algorithm: 'adamw' })],
  ])
const lrOf = (step: Step) => step.settings.groups.get('a')!.hyperparameters.lr
const NONE = new Map()
const say = (lr: number, gradient_scale = 1): StepValues => ({
  groups: { a: { lr } },
  gradient_scale,
  max_logits: NONE,
})
const NOTHING: StepValues = { groups: {}, gradient_scale: 1, max_logits: NONE }
const member = () => new Member({ fence: () => {}, expel: () => {}, changed: () => {} })
const MEMBER = member()

t.test('the values of a step frame hold from that step on, its gradient_scale for that step only', async (t) => {
  const first = new Step(1, groupsOf(1))
  first.announce(MEMBER, say(2, 0.5))
  t.equal(first.settings.gradient_scale, 0.5)
  const second = first.finish()
  t.match([first.settings.gradient_scale, second.settings.gradient_scale, lrOf(second)], [0.5, 1, 2])
  t.match([first.number, first.expected, second.number, second.expected], [1, 2, 2, 2])
  second.announce(MEMBER, { groups: { b: { lr: 3 } }, gradient_scale: 1, max_logits: NONE })
  t.equal(lrOf(second), 2)
})

t.test('a step frame said again must be identical; one after the first gradient must say nothing new', async (t) => {
  const first = new Step(1, groupsOf(1))
  first.announce(MEMBER, say(2))
  first.announce(MEMBER, say(2))
  const conflict = { code: 'STEP_CONFLICT', fields: { step: 1, expected_step: 1 } }
  t.throws(() => first.announce(MEMBER, say(3)), conflict)
  t.throws(() => first.announce(MEMBER, say(2, 2)), conflict)
  t.equal(lrOf(first), 2)
  first.begin(MEMBER)
  first.announce(MEMBER, say(2))
  const second = first.finish()
  t.throws(() => first.announce(MEMBER, say(3)), { code: 'STEP_CONFLICT', fields: { step: 1, expected_step: 2 } })
  second.begin(MEMBER)
  second.announce(MEMBER, NOTHING)
  t.throws(() => second.announce(MEMBER, say(5)), { code: 'STEP_CONFLICT' })
  t.equal(lrOf(second), 2)
})

t.test('a refused step frame changes no value, and bars its own member until it has sent another one', async (t) => {
  const step = new Step(1, groupsOf(1))
  const refused: StepValues[] = [
    { groups: { a: { lr: 2 }, c: {} }, gradient_scale: 1, max_logits: NONE },
    { groups: { a: { lr: 2 }, b: { lr: -1 } }, gradient_scale: 1, max_logits: NONE },
    { groups: { a: { lr: 2 } }, gradient_scale: Number.POSITIVE_INFINITY, max_logits: NONE },
  ]
  const other = member()
  for (const values of refused) {
    t.throws(() => step.announce(MEMBER, values), { code: 'HYPERPARAMETER_INVALID' })
    t.throws(() => step.checkAccepted(MEMBER), { code: 'STEP_CONFLICT', fields: { step: 1, expected_step: 1 } })
    step.checkAccepted(other)
  }
  t.equal(lrOf(step), 1)
  step.announce(MEMBER, say(4))
  step.checkAccepted(MEMBER)
  t.equal(lrOf(step), 4)
})

t.test('max_logits hold for one step only, and belong to what must be said again alike', async (t) => {
  const first = new Step(1, groupsOf(1))
  const values = (logits: number[]) => ({ ...say(2), max_logits: new Map([['h', logits]]) })
  first.announce(MEMBER, values([1, 200]))
  first.announce(MEMBER, values([1, 200]))
  t.throws(() => first.announce(MEMBER, values([1, 201])), { code: 'STEP_CONFLICT' })
  t.throws(() => first.announce(MEMBER, say(2)), { code: 'STEP_CONFLICT' })
  const second = first.finish()
  t.same(first.settings.frame.max_logits, values([1, 200]).max_logits)
  t.same(second.settings.frame.max_logits, new Map())
})

t.test('forgotten values were never said; with a gradient applied nothing is forgotten', async (t) => {
  const step = new Step(1, groupsOf(1))
  step.announce(MEMBER, say(2, 0.5))
  step.begin(MEMBER)
  step.forget(MEMBER)
  t.match([lrOf(step), step.settings.gradient_scale], [1, 1])
  step.announce(MEMBER, say(3))
  step.apply(0)
  step.forget(MEMBER)
  t.match([lrOf(step), step.begun, step.applied], [3, true, [0]])
})

t.test('replaced groups hold at once for a step that has applied nothing, otherwise from the next one', async (t) => {
  const untouched = new Step(1, groupsOf(1))
  untouched.announce(MEMBER, say(2))
  untouched.replace(groupsOf(7))
  t.equal(lrOf(untouched), 7)
  t.equal(lrOf(untouched.finish()), 7)

  const touched = new Step(1, groupsOf(1))
  touched.announce(MEMBER, say(2))
  touched.apply(1)
  touched.replace(groupsOf(7))
  t.equal(lrOf(touched), 2)
  const next = touched.finish()
  t.match([lrOf(touched), lrOf(next), lrOf(next.finish())], [2, 7, 7])

  const asked = new Step(1, groupsOf(1))
  asked.replace(groupsOf(7), 'next')
  t.match([lrOf(asked), lrOf(asked.finish())], [1, 7])
})

t.test('a step that could not be committed is where it was, and may be ended again', async (t) => {
  const step = new Step(3, groupsOf(1))
  step.begin(MEMBER)
  step.apply(0)
  await t.rejects(
    step.end(async () => {
      t.ok(step.begun)
      throw new Error('the disk is full')
    }),
    { message: 'the disk is full' },
  )
  step.apply(1)
  await step.end(async () => {})
  t.throws(() => step.apply(2), { message: /ending/ })
  step.finish()
  t.match([step.begun, step.applied], [false, [0, 1]])
})

t.test('the time of a replay counts for the step that it delays', async (t) => {
  const first = new Step(1, groupsOf(1))
  first.spend('compute', 2)
  const second = first.finish()
  first.spend('compute', 3)
  t.match([first.clock.seconds.compute, second.clock.seconds.compute], [2, 3])
})

t.test(
  'whatever comes in any order: values change only before they are fixed, and nothing applied is lost',
  async (t) => {
    const action = fc.oneof(
      fc.record({ kind: fc.constant('announce' as const), lr: fc.integer({ min: 1, max: 3 }) }),
      fc.record({ kind: fc.constantFrom('begin' as const, 'forget' as const, 'end' as const) }),
      fc.record({ kind: fc.constant('apply' as const), index: fc.nat(4) }),
    )
    const property = fc.property(fc.array(action, { maxLength: 20 }), (actions) => {
      const step = new Step(1, groupsOf(9))
      let fixed: number | undefined
      const applied = new Set<number>()
      for (const one of actions) {
        if (one.kind === 'announce') {
          const before = fixed
          try {
            step.announce(MEMBER, say(one.lr))
            fixed = one.lr
          } catch {
            if (before === undefined) return false
          }
          if (before !== undefined && fixed !== before) return false
        } else if (one.kind === 'apply') {
          if (fixed === undefined) {
            step.begin(MEMBER)
            fixed = lrOf(step)
          }
          step.apply(one.index)
          applied.add(one.index)
        } else if (one.kind === 'begin') {
          step.begin(MEMBER)
          fixed ??= lrOf(step)
        } else if (one.kind === 'forget') {
          step.forget(MEMBER)
          if (applied.size === 0) fixed = undefined
        }
        if (lrOf(step) !== (fixed ?? 9)) return false
        if (step.applied.join() !== [...applied].sort().join()) return false
      }
      return true
    })
    t.doesNotThrow(() => fc.assert(property, { seed: 5, numRuns: 500 }))
  },
)
