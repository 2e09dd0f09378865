import fc from 'fast-check'
import t, { type Test } from 'tap'
import { NAMED_COEFFICIENTS } from '../../kernels/orthogonalize/coefficients.js'
import { ServiceError } from '../../src/errors.js'
import { iterations } from '../../src/optimizer/coefficients.js'
import { effective, parseGroup, show, stateBearing, updateGroup } from '../../src/optimizer/hyperparameters.js'
import { HYPERPARAMETERS } from '../../src/optimizer/table.js'
import type { GroupDeclaration } from '../../src/wire/frame.js'

const JORDAN = [3.4445, -4.775, 2.0315]
const MUON = { name: 'hidden', algorithm: 'muon' }
const ADAMW = { name: 'rest', algorithm: 'adamw' }
const ADAM = { name: 'rest', algorithm: 'adam' }
const RMSPROP = { name: 'rest', algorithm: 'rmsprop' }
const SGD = { name: 'outer', algorithm: 'sgd' }

function refused(t: Test, work: () => unknown, ...parts: readonly string[]) {
  const error = thrown(work)
  t.equal(error?.code, 'HYPERPARAMETER_INVALID', `${parts.join(' ')}: ${error?.message}`)
  for (const part of parts) t.ok(error?.message.includes(part), `'${error?.message}' says ${part}`)
  t.ok((error?.message.length ?? 0) < 1000, 'the message is short')
}

function thrown(work: () => unknown): ServiceError | undefined {
  try {
    work()
    return undefined
  } catch (error) {
    if (error instanceof ServiceError) return error
    throw error
  }
}

t.test('the defaults are those of torch', async (t) => {
  t.same(effective(parseGroup(MUON)), {
    algorithm: 'muon',
    lr: 1e-3,
    weight_decay: 0.1,
    momentum: 0.95,
    nesterov: true,
    ns_steps: 5,
    ns_coefficients: JORDAN,
    eps: 1e-7,
    adjust_lr_fn: 'original',
    momentum_form: 'ema',
    momentum_dtype: 'float32',
    second_momentum: 'none',
    beta2: 0.95,
  })
  t.same(effective(parseGroup(ADAMW)), {
    algorithm: 'adamw',
    lr: 1e-3,
    betas: [0.9, 0.999],
    eps: 1e-8,
    weight_decay: 1e-2,
    amsgrad: false,
  })
  t.same(effective(parseGroup(ADAM)), {
    algorithm: 'adam',
    lr: 1e-3,
    betas: [0.9, 0.999],
    eps: 1e-8,
    weight_decay: 0,
    amsgrad: false,
  })
  t.same(effective(parseGroup(RMSPROP)), {
    algorithm: 'rmsprop',
    lr: 1e-2,
    alpha: 0.99,
    eps: 1e-8,
    weight_decay: 0,
    momentum: 0,
    centered: false,
  })
  t.same(effective(parseGroup(SGD)), {
    algorithm: 'sgd',
    lr: 1e-3,
    momentum: 0,
    dampening: 0,
    nesterov: false,
    weight_decay: 0,
  })
})

const NOT_NUMBERS = [
  Number.NaN,
  Number.POSITIVE_INFINITY,
  -Number.POSITIVE_INFINITY,
  1e39,
  '1',
  true,
  [],
  {},
  1n,
  undefined,
  null,
]
const BAD_RATE = [...NOT_NUMBERS, -1, -1e-300]
const BAD_SHARE = [...BAD_RATE, 1, 1.5]

const GOOD: [GroupDeclaration, string, readonly unknown[]][] = [
  [MUON, 'lr', [0, 1e-300, 1, 1e38]],
  [MUON, 'weight_decay', [0, 0.1, 2]],
  [MUON, 'momentum', [0, 0.5, 0.999999, 1 - 2 ** -53]],
  [MUON, 'nesterov', [true, false]],
  [MUON, 'ns_steps', [3, 5, 99]],
  [MUON, 'ns_coefficients', [...Object.keys(NAMED_COEFFICIENTS), JORDAN, [JORDAN, [2, -1.5, 0.5]]]],
  [MUON, 'eps', [0, 1e-30]],
  [
    MUON,
    'adjust_lr_fn',
    ['original', 'match_rms_adamw', 'spectral', 'none', 'rms:0.18', 'rms:1', 'rms:.5', 'rms:2.', 'rms:1e-3'],
  ],
  [MUON, 'momentum_form', ['ema', 'heavy_ball']],
  [MUON, 'momentum_dtype', ['float32', 'bfloat16']],
  [MUON, 'second_momentum', ['none', 'normuon']],
  [MUON, 'beta2', [0, 0.95, 0.999]],
  [ADAMW, 'amsgrad', [true, false]],
  [ADAM, 'amsgrad', [true, false]],
  [ADAM, 'weight_decay', [0]],
  [ADAM, 'betas', [[0, 0]]],
  [RMSPROP, 'alpha', [0, 0.9]],
  [RMSPROP, 'momentum', [0, 0.9]],
  [RMSPROP, 'eps', [0, 1]],
  [RMSPROP, 'weight_decay', [0]],
  [RMSPROP, 'centered', [false]],
  [ADAMW, 'lr', [0, 1]],
  [
    ADAMW,
    'betas',
    [
      [0, 0],
      [0.95, 0.99],
    ],
  ],
  [ADAMW, 'eps', [0, 1]],
  [ADAMW, 'weight_decay', [0, 1]],
  [SGD, 'lr', [0, 0.7]],
  [SGD, 'momentum', [0, 0.9]],
  [SGD, 'dampening', [0, 0.5, 1, -2]],
  [SGD, 'weight_decay', [0, 0.1]],
]

t.test('muonclip is muon with the defaults of Kimi K2, each of which can be set like those of muon', async (t) => {
  const clip = { ...MUON, algorithm: 'muonclip' }
  const muon = effective(parseGroup(MUON))
  const recipe = { adjust_lr_fn: 'match_rms_adamw', momentum_form: 'heavy_ball' }
  t.same(effective(parseGroup(clip)), { ...muon, algorithm: 'muonclip', ...recipe })
  const given = { lr: 0.5, adjust_lr_fn: 'spectral', momentum_form: 'ema', ns_coefficients: 'quintic', ns_steps: 3 }
  t.same(effective(parseGroup({ ...clip, ...given })), { ...muon, algorithm: 'muonclip', ...given })
  t.match(stateBearing(parseGroup(MUON), parseGroup({ ...clip, ...muon, algorithm: 'muonclip' })), /^algorithm is/)
  refused(t, () => updateGroup(parseGroup(clip), { ns_steps: 1, ns_coefficients: [10, -20, 30] }), 'unsafe')
})

t.test('values in range are taken as they are', async (t) => {
  for (const [group, key, values] of GOOD) {
    for (const value of values)
      t.same(effective(parseGroup({ ...group, [key]: value }))[key], value, `${key} ${show(value)}`)
  }
})

const BAD: [GroupDeclaration, string, readonly unknown[]][] = [
  [MUON, 'lr', BAD_RATE],
  [MUON, 'weight_decay', BAD_RATE],
  [MUON, 'momentum', BAD_SHARE],
  [MUON, 'nesterov', [0, 1, 'true', undefined, null, []]],
  [MUON, 'ns_steps', [...NOT_NUMBERS, 0, -1, 1.5, 100, 2 ** 53]],
  [
    MUON,
    'ns_coefficients',
    [
      'jordan',
      'constructor',
      '__proto__',
      '',
      3,
      true,
      {},
      undefined,
      [],
      [1, 2],
      [1, 2, 3, 4],
      [1, 2, Number.NaN],
      ['1', 2, 3],
      [[]],
      [[1, 2]],
      [JORDAN, 'quintic'],
      [JORDAN, 1, 2],
      [[JORDAN]],
      Array(100).fill([2, -1.5, 0.5]),
      [1, -1e39, 1],
    ],
  ],
  [MUON, 'eps', BAD_RATE],
  [
    MUON,
    'adjust_lr_fn',
    [
      '',
      'Original',
      'rms',
      'rms:',
      'rms:0',
      'rms:-1',
      'rms:NaN',
      'rms:Infinity',
      'rms:1e400',
      'rms:1e39',
      'rms:1e-400',
      'rms:0x1',
      'rms: 1',
      'rms:1 ',
      'rms:.',
      'rms:1\n',
      0.2,
      null,
      ['original'],
    ],
  ],
  [MUON, 'momentum_form', ['EMA', '', 1, undefined, ['ema']]],
  [
    MUON,
    'momentum_dtype',
    ['float16', 'float64', 1, {}, Object.create(null), { toString: 1 }, ['bfloat16'], 'constructor'],
  ],
  [MUON, 'second_momentum', ['NorMuon', '', true, 1, null, ['normuon']]],
  [MUON, 'beta2', BAD_SHARE],
  [ADAMW, 'amsgrad', [0, 1, 'true', null]],
  [ADAM, 'weight_decay', [...BAD_RATE, 0.01]],
  [RMSPROP, 'alpha', BAD_SHARE],
  [RMSPROP, 'momentum', BAD_SHARE],
  [RMSPROP, 'eps', BAD_RATE],
  [RMSPROP, 'weight_decay', [...BAD_RATE, 0.01]],
  [RMSPROP, 'centered', [true, 0, 'false', null]],
  [ADAMW, 'lr', BAD_RATE],
  [
    ADAMW,
    'betas',
    [
      0.9,
      [],
      [0.9],
      [0.9, 0.9, 0.9],
      [0.9, 1],
      [-0.1, 0.9],
      [Number.NaN, 0.9],
      [0.9, '0.9'],
      [true, 0],
      { 0: 0.9, 1: 0.9, length: 2 },
    ],
  ],
  [ADAMW, 'eps', BAD_RATE],
  [ADAMW, 'weight_decay', BAD_RATE],
  [SGD, 'lr', BAD_RATE],
  [SGD, 'momentum', BAD_SHARE],
  [SGD, 'dampening', NOT_NUMBERS],
  [SGD, 'nesterov', ['yes', 1]],
  [SGD, 'weight_decay', BAD_RATE],
]

t.test('values out of range or of another type are refused with group, key and value', async (t) => {
  for (const [group, key, values] of BAD) {
    for (const value of values) {
      refused(t, () => parseGroup({ ...group, [key]: value }), `group '${group.name}'`, key, show(value), 'expected')
    }
  }
})

const FIXED = ['momentum_form', 'momentum_dtype', 'second_momentum', 'amsgrad', 'centered']

t.test('a step may change every other hyperparameter to the same values and no others', async (t) => {
  for (const [group, key, values] of GOOD.filter(([, key]) => !FIXED.includes(key))) {
    for (const value of values) t.same(effective(updateGroup(parseGroup(group), { [key]: value }))[key], value, key)
  }
  for (const [group, key, values] of BAD.filter(([, key]) => !FIXED.includes(key))) {
    for (const value of values) refused(t, () => updateGroup(parseGroup(group), { [key]: value }), group.name, key)
  }
})

t.test('what says the meaning of the state is fixed at open', async (t) => {
  for (const [group, key, value] of [
    [MUON, 'algorithm', 'muon'],
    [MUON, 'momentum_form', 'ema'],
    [MUON, 'momentum_form', 'heavy_ball'],
    [MUON, 'momentum_dtype', 'float32'],
    [MUON, 'second_momentum', 'normuon'],
    [ADAM, 'amsgrad', true],
    [ADAMW, 'amsgrad', false],
    [RMSPROP, 'centered', false],
  ] as const) {
    const change = { [key]: value }
    refused(t, () => updateGroup(parseGroup(group), change), `group '${group.name}'`, key, 'fixed at open', show(value))
  }
})

t.test('unknown names are refused', async (t) => {
  const names = [
    'learning_rate',
    'LR',
    '',
    'name2',
    'given',
    'hyperparameters',
    'constructor',
    'toString',
    'x'.repeat(10000),
    'rho',
  ]
  for (const key of [...names, '__proto__']) {
    const hostile = JSON.parse(JSON.stringify({ [key]: 1 }))
    for (const group of [MUON, ADAMW, ADAM, RMSPROP, SGD]) {
      refused(
        t,
        () => parseGroup({ ...hostile, ...group }),
        group.name,
        show(key),
        `no hyperparameter of ${group.algorithm}`,
      )
      refused(t, () => updateGroup(parseGroup(group), hostile), group.name, show(key))
    }
  }
  refused(t, () => updateGroup(parseGroup(MUON), { name: 'other' }), `'name' is no hyperparameter of muon`)
  refused(t, () => parseGroup({ ...ADAMW, momentum: 0.9 }), `'momentum' is no hyperparameter of adamw`)
  for (const algorithm of ['Muon', '', 'lion', 'constructor', '__proto__', 'x'.repeat(10000)]) {
    refused(
      t,
      () => parseGroup({ name: 'g', algorithm }),
      show(algorithm),
      'expected one of muon, adamw, adam, rmsprop, sgd',
    )
  }
})

t.test('known names that are not supported are refused with the reason', async (t) => {
  const keywords: [string, string][] = [
    ['maximize', 'gradient_scale -1'],
    ['foreach', 'leave it out'],
    ['fused', 'leave it out'],
    ['capturable', 'leave it out'],
    ['differentiable', 'leave it out'],
    ['decoupled_weight_decay', 'adamw'],
  ]
  for (const group of [MUON, ADAMW, ADAM, RMSPROP, SGD]) {
    for (const [key, reason] of keywords) {
      for (const value of [true, false, null]) {
        refused(t, () => parseGroup({ ...group, [key]: value }), `${key} is not supported`, reason)
        refused(t, () => updateGroup(parseGroup(group), { [key]: value }), `${key} is not supported`, reason)
      }
    }
  }
})

t.test('what needs the weights is refused with that reason', async (t) => {
  for (const group of [ADAM, RMSPROP]) {
    refused(t, () => parseGroup({ ...group, weight_decay: 0.1 }), 'weight_decay is 0.1', 'needs the weights', 'adamw')
  }
  refused(t, () => parseGroup({ ...RMSPROP, centered: true }), 'centered is true', 'centering is not supported')
})

t.test('a group has a name of bounded length', async (t) => {
  t.equal(parseGroup({ ...MUON, name: 'x'.repeat(1024) }).name.length, 1024)
  for (const name of ['', 'x'.repeat(1025)]) {
    const error = thrown(() => parseGroup({ ...MUON, name }))
    t.equal(error?.code, 'PARAMETER_INVALID')
    t.match(error?.message, `has ${name.length} characters, expected 1 to 1024`)
  }
})

t.test('ns_steps follows ns_coefficients until it is given', async (t) => {
  const two = [JORDAN, [2, -1.5, 0.5]]
  const cases: [Record<string, unknown>, number][] = [
    [{}, 5],
    [{ ns_coefficients: JORDAN }, 5],
    [{ ns_coefficients: two }, 2],
    [{ ns_coefficients: two, ns_steps: 7 }, 7],
    [{ ns_coefficients: 'quintic' }, 5],
    [{ ns_coefficients: 'deepseek_v4' }, 10],
    [{ ns_coefficients: 'deepseek_v4', ns_steps: 9 }, 9],
  ]
  for (const [given, ns_steps] of cases)
    t.equal(effective(parseGroup({ ...MUON, ...given })).ns_steps, ns_steps, show(given))
  const unset = parseGroup(MUON)
  t.equal(effective(updateGroup(unset, { ns_coefficients: 'deepseek_v4' })).ns_steps, 10)
  t.equal(
    effective(updateGroup(updateGroup(unset, { ns_coefficients: 'deepseek_v4' }), { ns_coefficients: two })).ns_steps,
    2,
  )
  t.equal(effective(updateGroup(updateGroup(unset, { ns_steps: 6 }), { ns_coefficients: 'deepseek_v4' })).ns_steps, 6)
  t.equal(effective(updateGroup(parseGroup({ ...MUON, ns_steps: 5 }), { ns_coefficients: two })).ns_steps, 5)
})

t.test('the iterations are the set, cut or filled with its last triple', async (t) => {
  const of = (given: Record<string, unknown>) => {
    const group = parseGroup({ ...MUON, ...given })
    return group.algorithm === 'muon' ? iterations(group.hyperparameters) : []
  }
  t.same(of({}), Array(5).fill(JORDAN))
  t.same(of({ ns_coefficients: [JORDAN, [2, -1.5, 0.5]], ns_steps: 3 }), [JORDAN, [2, -1.5, 0.5], [2, -1.5, 0.5]])
  t.same(of({ ns_coefficients: 'polar_express' }), NAMED_COEFFICIENTS.polar_express.coefficients.slice(0, 5))
})

t.test('an unsafe set of coefficients is refused at open and at every change', async (t) => {
  const unsafe: Record<string, unknown>[] = [
    { ns_coefficients: [1, 1, 1] },
    { ns_coefficients: [-3.4445, 4.775, -2.0315] },
    { ns_coefficients: [0, 0, 0] },
    { ns_coefficients: [1e38, -1e38, 1e38] },
    { ns_coefficients: 'polar_express', ns_steps: 1 },
    { ns_coefficients: [JORDAN, [8, -23, 17]] },
  ]
  for (const given of unsafe) {
    refused(t, () => parseGroup({ ...MUON, ...given }), `group 'hidden'`, 'ns_coefficients', 'ns_steps', 'unsafe')
    refused(t, () => updateGroup(parseGroup(MUON), given), 'unsafe')
  }
  refused(
    t,
    () => updateGroup(parseGroup({ ...MUON, ns_coefficients: 'polar_express' }), { ns_steps: 1 }),
    'ns_steps 1',
  )
})

t.test('nesterov of sgd needs momentum and no dampening, whichever of them changes', async (t) => {
  const nesterov = { ...SGD, nesterov: true, momentum: 0.9 }
  t.equal(effective(parseGroup(nesterov)).nesterov, true)
  refused(t, () => parseGroup({ ...SGD, nesterov: true }), 'nesterov', 'momentum is 0')
  refused(t, () => parseGroup({ ...nesterov, dampening: 0.1 }), 'nesterov', 'dampening is 0.1')
  refused(t, () => updateGroup(parseGroup(nesterov), { momentum: 0 }), 'momentum is 0')
  refused(t, () => updateGroup(parseGroup(nesterov), { dampening: 1 }), 'dampening is 1')
  refused(t, () => updateGroup(parseGroup(SGD), { nesterov: true }), 'momentum is 0')
  t.equal(effective(updateGroup(parseGroup(nesterov), { nesterov: false, momentum: 0 })).momentum, 0)
})

t.test('an update leaves the group it was given as it was, also a refused one', async (t) => {
  const group = parseGroup(MUON)
  const before = structuredClone(group)
  updateGroup(group, { lr: 1, ns_coefficients: 'quintic' })
  refused(t, () => updateGroup(group, { lr: 2, momentum: 3 }), 'momentum')
  t.same(group, before)
})

t.test('the first difference that makes a state useless is named', async (t) => {
  const heavy = { ...MUON, momentum_form: 'heavy_ball' }
  const cases: [GroupDeclaration, GroupDeclaration, string | undefined][] = [
    [MUON, MUON, undefined],
    [MUON, { ...MUON, lr: 1, nesterov: false, ns_coefficients: 'quintic', momentum_form: 'ema' }, undefined],
    [SGD, { ...SGD, momentum: 0.9 }, undefined],
    [MUON, ADAMW, `algorithm is 'muon' in the run, 'adamw' given`],
    [ADAMW, heavy, `algorithm is 'adamw' in the run, 'muon' given`],
    [MUON, heavy, `momentum_form is 'ema' in the run, 'heavy_ball' given`],
    [MUON, { ...MUON, beta2: 0.5 }, undefined],
    [MUON, { ...MUON, momentum_dtype: 'bfloat16' }, `momentum_dtype is 'float32' in the run, 'bfloat16' given`],
    [MUON, { ...MUON, second_momentum: 'normuon' }, `second_momentum is 'none' in the run, 'normuon' given`],
    [ADAM, { ...ADAM, amsgrad: true }, 'amsgrad is false in the run, true given'],
    [ADAM, ADAMW, `algorithm is 'adam' in the run, 'adamw' given`],
    [heavy, MUON, `momentum_form is 'heavy_ball' in the run, 'ema' given`],
  ]
  for (const [a, b, text] of cases) t.equal(stateBearing(parseGroup(a), parseGroup(b)), text)
})

const changes = fc.record(
  {
    lr: fc.double({ min: 0, max: 10, noNaN: true }),
    weight_decay: fc.double({ min: 0, max: 1, noNaN: true }),
    momentum: fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true }),
    nesterov: fc.boolean(),
    ns_steps: fc.integer({ min: 5, max: 99 }),
    ns_coefficients: fc.constantFrom('quintic', 'deepseek_v4', JORDAN, [JORDAN, [2, -1.5, 0.5]]),
    adjust_lr_fn: fc.constantFrom('original', 'none', 'rms:0.18'),
  },
  { requiredKeys: [] },
)

t.test('applying changes twice is applying them once, and what is in force describes the group', async (t) => {
  fc.assert(
    fc.property(changes, changes, (first, second) => {
      const group = updateGroup(parseGroup(MUON), first)
      const once = updateGroup(group, second)
      t.same(effective(updateGroup(once, second)), effective(once))
      t.same(effective(parseGroup({ name: 'again', ...effective(once) })), effective(once))
      t.same(JSON.parse(JSON.stringify(effective(once))), effective(once))
    }),
    { seed: 3, numRuns: 100 },
  )
})

t.test('any value of any type is either in force or refused', async (t) => {
  const keys = fc.constantFrom(
    ...Object.keys(HYPERPARAMETERS.muon),
    ...Object.keys(HYPERPARAMETERS.sgd),
    ...Object.keys(HYPERPARAMETERS.rmsprop),
    'betas',
    'amsgrad',
  )
  fc.assert(
    fc.property(
      fc.constantFrom(MUON, ADAMW, ADAM, RMSPROP, SGD),
      keys,
      fc.anything({ withBigInt: true, withDate: true, withMap: true }),
      (group, key, value) => {
        let parsed: ReturnType<typeof parseGroup> | undefined
        const error = thrown(() => {
          parsed = parseGroup({ ...group, [key]: value })
        })
        if (parsed) t.same(effective(parsed)[key], value)
        else t.equal(error?.code, 'HYPERPARAMETER_INVALID')
      },
    ),
    { seed: 4, numRuns: 500 },
  )
})

t.test('a value in a message is one short line', async (t) => {
  t.equal(show('a\nb'), `'a\\nb'`)
  t.equal(show(Number.NaN), 'NaN')
  const wide = Object.fromEntries(Array.from({ length: 1000 }, (_, i) => [`key${i}`, i]))
  for (const value of ['x'.repeat(1e6), wide, Array(1e6).fill(0), [[[[[]]]]], { a: { b: { c: {} } } }]) {
    t.ok(show(value).length <= 123)
    t.notMatch(show(value), '\n')
  }
})

t.test('the table has every hyperparameter with its default, a sentence and what is expected', async (t) => {
  t.same(Object.keys(HYPERPARAMETERS), ['muon', 'adamw', 'adam', 'rmsprop', 'sgd', 'muonclip'])
  for (const group of [MUON, ADAMW, ADAM, RMSPROP, SGD, { ...MUON, algorithm: 'muonclip' }]) {
    const { algorithm, ...values } = effective(parseGroup(group))
    const table = HYPERPARAMETERS[algorithm]
    t.same(Object.fromEntries(Object.entries(table).map(([key, row]) => [key, row.default])), values)
    for (const { description, expected } of Object.values(table)) {
      t.match(description, /^[A-Z].*\.$/)
      t.ok(expected.length > 0)
    }
  }
  t.equal(HYPERPARAMETERS.muon.momentum_form.sticky, false, 'it is fixed at open')
})
