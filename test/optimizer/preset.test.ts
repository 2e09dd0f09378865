import t, { type Test } from 'tap'
import { ServiceError } from '../../src/errors.js'
import { effective, updateGroup } from '../../src/optimizer/hyperparameters.js'
import { type Presets, parsePreset, parsePresetGroup } from '../../src/optimizer/preset.js'

const FILE = {
  description: 'a recipe',
  source: 'a paper',
  algorithm: 'muon',
  hyperparameters: {
    muon: { lr: { value: 0.5, source: 'section 1', confirmed: false }, momentum_form: 'heavy_ball', ns_steps: 7 },
    adamw: { eps: { value: 1e-20 } },
  },
}
const PRESETS: Presets = new Map([['mine', parsePreset('mine', FILE)]])
const group = (keys: object) => parsePresetGroup({ name: 'g', ...keys }, PRESETS)

function refused(t: Test, work: () => unknown, message: string) {
  t.throws(work, new ServiceError('HYPERPARAMETER_INVALID', message), message)
}

t.test('a preset keeps its values with their sources; a bare value is confirmed and has none', async (t) => {
  t.same(PRESETS.get('mine'), {
    name: 'mine',
    description: 'a recipe',
    source: 'a paper',
    algorithm: 'muon',
    recipes: {
      muon: {
        lr: { value: 0.5, source: 'section 1', confirmed: false },
        momentum_form: { value: 'heavy_ball', source: '', confirmed: true },
        ns_steps: { value: 7, source: '', confirmed: true },
      },
      adamw: { eps: { value: 1e-20, source: '', confirmed: true } },
    },
  })
  const { source, ...rest } = FILE
  t.equal(parsePreset('mine', rest).source, '', 'the source may be left out')
})

t.test("a group has its preset's algorithm and values, torch's where the preset has none, and says so", async (t) => {
  const expected = {
    algorithm: 'muon',
    preset: 'mine',
    lr: 0.5,
    momentum_form: 'heavy_ball',
    ns_steps: 7,
    nesterov: true,
  }
  t.match(effective(group({ preset: 'mine' })), expected)
  t.same(Object.keys(effective(group({ preset: 'mine' }))).slice(0, 3), ['algorithm', 'preset', 'lr'])
  t.notOk('preset' in effective(group({ algorithm: 'muon' })))
})

t.test('what is given beside the preset wins, the algorithm too', async (t) => {
  t.match(effective(group({ preset: 'mine', lr: 1, ns_steps: 5 })), { lr: 1, ns_steps: 5, momentum_form: 'heavy_ball' })
  const adamw = effective(group({ preset: 'mine', algorithm: 'adamw', lr: 2 }))
  const rest = { betas: [0.9, 0.999], eps: 1e-20, weight_decay: 0.01, amsgrad: false }
  t.same(adamw, { algorithm: 'adamw', preset: 'mine', lr: 2, ...rest })
})

t.test('coefficients beside a preset bring their own number of iterations, as they do without', async (t) => {
  const steps = (keys: object) => effective(group({ preset: 'mine', ...keys })).ns_steps
  t.equal(steps({}), 7)
  t.equal(steps({ ns_coefficients: 'deepseek_v4' }), 10, 'not the first seven of ten')
  t.equal(steps({ ns_coefficients: 'keller_jordan' }), 5)
  t.equal(steps({ ns_coefficients: 'deepseek_v4', ns_steps: 8 }), 8)
  t.equal(steps({ ns_steps: 8 }), 8)
  t.equal(effective(updateGroup(group({ preset: 'mine' }), { lr: 3 })).ns_steps, 7)
})

t.test('a step changes values and keeps the preset, which itself cannot change', async (t) => {
  const before = group({ preset: 'mine' })
  const after = effective(updateGroup(before, { lr: 3 }))
  t.match(after, { preset: 'mine', lr: 3, ns_steps: 7 })
  t.equal(effective(before).lr, 0.5)
  refused(
    t,
    () => updateGroup(before, { preset: 'mine' }),
    "group 'g': preset is fixed at open, a step cannot change it to 'mine'",
  )
})

t.test(
  'an unknown preset, one without the algorithm, and a group with neither are refused with what is known',
  async (t) => {
    refused(t, () => group({ preset: 'other' }), "group 'g': preset is 'other', expected one of mine")
    refused(t, () => group({ preset: 'constructor' }), "group 'g': preset is 'constructor', expected one of mine")
    refused(
      t,
      () => group({ preset: 'mine', algorithm: 'sgd' }),
      "group 'g': preset 'mine' has no values for 'sgd', only for muon, adamw",
    )
    t.throws(() => group({ preset: 'mine', algorithm: 'toString' }), { message: /has no values for 'toString'/ })
    t.throws(() => group({}), {
      message: /^group 'g': it has neither an algorithm nor a preset, expected one of muon, /,
    })
    t.throws(() => group({ preset: 'mine', lr: -1 }), { message: /^group 'g': lr is -1, expected/ })
  },
)

t.test('a file with a wrong key or value is refused with the key', async (t) => {
  const muon = (values: object) => ({ ...FILE, hyperparameters: { muon: values } })
  const cases: [unknown, string][] = [
    [null, 'the file is null, expected a map'],
    [[], 'the file is [], expected a map'],
    [{ ...FILE, colour: 'red' }, 'colour is unknown, expected description, source, algorithm, hyperparameters'],
    [{ ...FILE, description: undefined }, 'description is missing'],
    [{ ...FILE, description: 5 }, 'description is 5, expected a text'],
    [{ ...FILE, source: null }, 'source is null, expected a text'],
    [{ ...FILE, hyperparameters: undefined }, 'hyperparameters is missing'],
    [{ ...FILE, algorithm: 'sgd' }, "algorithm is 'sgd', expected one of hyperparameters: muon, adamw"],
    [{ ...FILE, hyperparameters: { muon: 5 } }, 'hyperparameters.muon is 5, expected a map'],
    [
      muon({ lr: { value: 1, sauce: '' } }),
      'hyperparameters.muon.lr.sauce is unknown, expected value, source, confirmed',
    ],
    [muon({ lr: { source: 'x' } }), 'hyperparameters.muon.lr.value is missing'],
    [muon({ lr: { value: 1, source: 5 } }), 'hyperparameters.muon.lr.source is 5, expected a text'],
    [
      muon({ lr: { value: 1, confirmed: 'yes' } }),
      "hyperparameters.muon.lr.confirmed is 'yes', expected true or false",
    ],
    [muon({ name: 'x' }), 'hyperparameters.muon.name is no hyperparameter'],
    [muon({ preset: 'mine' }), 'hyperparameters.muon.preset is no hyperparameter'],
    [muon({ lr: -1 }), 'hyperparameters.muon: lr is -1, expected a finite float32 number >= 0'],
  ]
  for (const [document, message] of cases) refused(t, () => parsePreset('mine', document), message)
  const unknown = { ...FILE, hyperparameters: { ...FILE.hyperparameters, adagrad: {} } }
  t.throws(() => parsePreset('mine', unknown), {
    message: /^hyperparameters\.adagrad: algorithm is 'adagrad', expected/,
  })
})
