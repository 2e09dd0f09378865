import t from 'tap'
import { planStep } from '../../src/optimizer/algorithms/algorithm.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../src/optimizer/parameter.js'
import { Plans } from '../../src/run/plans.js'

const GROUP = parseGroup({ name: 'g', algorithm: 'adamw', lr: 0.01 })
const OTHER = parseGroup({ name: 'h', algorithm: 'adamw', lr: 0.02 })
const MANY = parseGroup({ name: 'm', algorithm: 'muon', lr: 0.02 })
const GROUPS = new Map([GROUP, OTHER, MANY].map((group) => [group.name, group]))
const [first, second, larger, cut] = parseParameters(
  [
    { name: 'a', shape: [4, 4], group: 'g' },
    { name: 'b', shape: [4, 4], group: 'g' },
    { name: 'c', shape: [8, 4], group: 'g' },
    { name: 'd', shape: [65, 4, 4], group: 'm', matrices: 'batch' },
  ],
  GROUPS,
)

t.test('parameters that are declared alike share the plan of a step', async (t) => {
  const plans = new Plans()
  const at = { step: 3, replay: false }
  const plan = plans.of(first!, GROUP, at)
  t.same(plan, planStep(first!, GROUP, at))
  t.equal(plans.of(second!, GROUP, { ...at }), plan)
})

t.test('another form, group, step or a replay has a plan of its own', async (t) => {
  const plans = new Plans()
  const at = { step: 3, replay: false }
  plans.of(first!, GROUP, at)
  const cases = [
    [larger!, GROUP, at],
    [first!, OTHER, at],
    [first!, GROUP, { step: 4, replay: false }],
    [first!, GROUP, { step: 4, replay: true }],
    [first!, GROUP, { step: 3, replay: false }],
  ] as const
  for (const [parameter, group, where] of cases)
    t.same(plans.of(parameter, group, where), planStep(parameter, group, where))
})

t.test('a plan of many tasks is not kept', async (t) => {
  const plans = new Plans()
  const at = { step: 1, replay: false }
  t.not(plans.of(cut!, MANY, at), plans.of(cut!, MANY, at))
  t.same(plans.of(cut!, MANY, at), planStep(cut!, MANY, at))
})
