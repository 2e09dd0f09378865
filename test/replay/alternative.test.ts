import t, { type Test } from 'tap'
import { numbersOf } from '../../src/replay/similarity.js'
import { id } from '../keep/data-folder.js'
import { type AdamwState, adamwStep, frobenius } from '../reference.js'
import { train } from '../run/trainer.js'
import { normal, RawClient } from '../service.js'
import { groupsFile, printed, recorder, replaying } from './recorded.js'

const LAST = 6
const SHAPES = { a: [12, 8], b: [6, 10], c: [30] }
const PLAIN = {
  groups: [
    { name: 'matrices', algorithm: 'muon', lr: 0.02 },
    { name: 'rest', algorithm: 'sgd', lr: 0.5, momentum: 0.9 },
  ],
  parameters: [
    { name: 'block.a', shape: SHAPES.a, group: 'matrices', heads: 2 },
    { name: 'block.b', shape: SHAPES.b, group: 'matrices', update_dtype: 'bfloat16' },
    { name: 'c', shape: SHAPES.c, group: 'rest', update_dtype: 'float16' },
  ],
}
const SCALE = -0.5

type Sent = { gradients: Float32Array[]; updates: Float64Array[] }

let data: string
/** The gradients of each step of the recorded run after gradient_scale, and scale · data of each update. */
const sent: Sent[] = []
t.before(async () => {
  data = t.testdir({})
  const service = await recorder(data, { checkpoint_steps: 3 })
  const client = await RawClient.connect(service.url)
  await client.open({ run: 'r', ...PLAIN })
  for (let step = 1; step <= LAST; step++) {
    // Powers of two between the rates: their ratio to others is exact.
    client.send({ type: 'step', step, groups: { rest: { lr: 0.5 / 2 ** step } }, gradient_scale: SCALE })
    const gradients = PLAIN.parameters.map(({ shape }, i) =>
      normal(
        100 * step + i,
        shape.reduce((all, size) => all * size, 1),
      ),
    )
    await client.step(step, gradients)
    await service.runs.keeper('r').settled()
    const updates = PLAIN.parameters.map(({ update_dtype = 'float32' }, i) => {
      const { scale, data } = client.updates.get(i)!
      const numbers = numbersOf(new Uint8Array(data), update_dtype as 'float32', gradients[i]!.length)
      return Float64Array.from(numbers, (value) => value * scale)
    })
    sent.push({ gradients: gradients.map((values) => values.map((value) => value * SCALE)), updates })
  }
  await client.close()
  await service.app.close()
})

const close = (t: Test, has: number | undefined, expected: number, limit: number, what: string) =>
  t.ok(Math.abs(has! / expected - 1) < limit, `${what} is ${has}, expected ${expected}`)
const product = (one: Float64Array, other: Float64Array) => one.reduce((sum, value, i) => sum + value * other[i]!, 0)
const joined = (all: readonly Float64Array[]) => Float64Array.from(all.flatMap((each) => [...each]))

t.test('norms and RMS are those of the gradients and updates that were sent', async (t) => {
  const { steps, equal } = await replaying(data, 'r')
  t.equal(equal, true)
  for (const [i, { gradients, updates }] of sent.entries()) {
    const { matrices, rest } = steps[i]!.rows
    close(t, matrices!.gradient_norm, frobenius([...gradients[0]!, ...gradients[1]!]), 1e-7, 'gradient norm')
    const both = joined(updates.slice(0, 2))
    close(t, matrices!.update_norm, frobenius(both), 1e-12, 'update norm')
    close(t, matrices!.update_rms, frobenius(both) / Math.sqrt(both.length), 1e-12, 'update RMS')
    close(t, rest!.update_norm, frobenius(updates[2]!), 1e-12, 'update norm of float16')
    t.equal(rest!.lr, 0.5 / 2 ** (i + 1))
    t.equal(rest!.largest.parameter, 'c')
  }
})

t.test('with another lr an update is so many times as large, and has the direction', async (t) => {
  const folder = t.testdir({})
  const groups = [{ ...PLAIN.groups[1], lr: 2 }]
  const constant = await replaying(data, 'r', { groups: groupsFile(folder, groups) })
  for (const { step, rows } of constant.steps) {
    t.equal(rows.rest!.alternative!.ratio, 2 / (0.5 / 2 ** step))
    close(t, rows.rest!.alternative!.cosine, 1, 1e-15, 'cosine')
    t.equal(rows.matrices!.alternative, undefined, 'a group that no other takes is as it was')
  }
  t.match(constant.notes.join('\n'), 'the run changes lr of rest, the other group does not: lr_schedule run follows it')
  t.match(constant.rows, [
    { name: 'matrices', alternative: undefined },
    { name: 'rest', alternative: { begins: 'state' } },
  ])
  const following = [{ ...PLAIN.groups[1], lr: 2, lr_schedule: 'run' }]
  const followed = await replaying(data, 'r', { groups: groupsFile(folder, { groups: following }) })
  for (const { step, rows } of followed.steps) {
    t.equal(rows.rest!.alternative!.lr, 2 / 2 ** (step - 1))
    t.equal(rows.rest!.alternative!.ratio, 8, 'as the largest rates, 2 and 0.25')
  }
  t.notMatch(followed.notes.join('\n'), 'lr_schedule')
  // From a checkpoint on the momentum is that of the run, whatever lr it had.
  const later = await replaying(data, 'r', { from: id(3), groups: groupsFile(folder, groups) })
  t.same(
    later.steps.map(({ rows }) => rows.rest),
    constant.steps.slice(3).map(({ rows }) => rows.rest),
  )
})

for (const from of [0, 3]) {
  t.test(`AdamW in the place of Muon is that of the float64 oracle, from step ${from}`, async (t) => {
    const yaml =
      'groups:\n  - name: adam\n    algorithm: adamw\n    lr: 0.01\n    betas: [0.8, 0.9]\n    parameters: ["block.*"]\n'
    const file = groupsFile(t.testdir({}), yaml, 'groups.yaml')
    const { steps, notes, rows, equal } = await replaying(data, 'r', { from: id(from), groups: file })
    t.equal(equal, true)
    t.match(rows[0], { name: 'matrices', alternative: { group: 'adam', algorithm: 'adamw', begins: 'no state' } })
    t.ok(notes.some((note) => note === `behind step ${from}: matrices begins with no state`))
    const states = [SHAPES.a, SHAPES.b].map(([height, width]): AdamwState => {
      return { exp_avg: new Float64Array(height! * width!), exp_avg_sq: new Float64Array(height! * width!) }
    })
    for (const [i, { gradients, updates }] of sent.slice(from).entries()) {
      const oracle = states.map((state, at) => {
        const { data, ...next } = adamwStep(state, gradients[at]!, { betas: [0.8, 0.9], eps: 1e-8, step: i + 1 })
        states[at] = next
        return data.map((value) => -0.01 * value)
      })
      const [expected, applied] = [joined(oracle), joined(updates.slice(0, 2))]
      const { alternative } = steps[i]!.rows.matrices!
      // Half of the elements are bfloat16, with eight bits.
      close(t, alternative!.update_norm, frobenius(expected), 1e-3, 'norm')
      close(t, alternative!.update_rms, frobenius(expected) / Math.sqrt(expected.length), 1e-3, 'RMS')
      const cosine = product(expected, applied) / frobenius(expected) / frobenius(applied)
      t.ok(Math.abs(alternative!.cosine! - cosine) < 1e-3, `cosine ${alternative!.cosine}, expected ${cosine}`)
      close(t, alternative!.ratio, frobenius(expected) / frobenius(applied), 1e-3, 'ratio')
    }
  })
}

t.test('Muon may take what AdamW had, and the run itself comes to the same beside it', async (t) => {
  const own = t.testdir({})
  const service = await recorder(own)
  const { client, traces } = await train(service, { last: 4 })
  await client.close()
  await service.app.close()
  const groups = [
    { name: 'muon', algorithm: 'muon', lr: 0.02, parameters: ['m', 'embed*'] },
    { name: 'muonclip', algorithm: 'muonclip', lr: 3e-4 },
    { name: 'rest', algorithm: 'adamw', lr: 0.001, parameters: ['experts', 'norm'] },
  ]
  const { steps, rows, equal } = await replaying(own, 'r', { groups: groupsFile(own, groups) })
  t.equal(equal, true)
  t.match(
    steps,
    traces.map(({ digest }) => ({ digest })),
  )
  t.match(
    rows.map(({ name, alternative }) => [name, alternative?.begins]),
    [
      ['muon', 'state'],
      ['muonclip', 'state'],
      ['normuon', 'no state'],
      ['adamw', 'no state'],
      ['amsgrad', undefined],
      ['rmsprop', 'no state'],
      ['sgd', undefined],
    ],
  )
  for (const { step, rows } of steps) {
    close(t, rows.muonclip!.alternative!.cosine, 1, 1e-12, 'with its own values an update is the same')
    t.equal(rows.muonclip!.alternative!.ratio, 1)
    t.equal(rows.rmsprop === undefined, step === 3, 'a step that skips it')
  }
})

t.test('a group of the run is cut in two where another one takes a part of it', async (t) => {
  const part = [
    { name: 'x', algorithm: 'sgd', lr: 1, parameters: ['*.b'] },
    { name: 'rest', algorithm: 'sgd', lr: 1, momentum: 0.9 },
  ]
  const { rows, steps } = await replaying(data, 'r', { groups: groupsFile(t.testdir({}), part) })
  t.match(rows, [
    { name: 'matrices, as it was', alternative: undefined, parameters: ['block.a'] },
    { name: 'matrices, x', alternative: { begins: 'no state' }, parameters: ['block.b'] },
    { name: 'rest', alternative: { begins: 'state' } },
  ])
  close(t, steps[0]!.rows['matrices, x']!.gradient_norm, frobenius(sent[0]!.gradients[1]!), 1e-7, 'gradient norm')
})

t.test('groups that do not fit the run are refused', async (t) => {
  const folder = t.testdir({})
  const cases: [groups: unknown, message: string | RegExp][] = [
    [[], 'groups is empty, expected at least one'],
    [{ group: [] }, 'groups is undefined, expected a list'],
    ['- 7', 'a group is 7, expected a map with a name'],
    [[{ algorithm: 'sgd' }], /^a group is { algorithm: 'sgd' }, expected a map with a name$/],
    [
      [{ name: 'other', algorithm: 'sgd' }],
      "the run has no parameters in a group 'other': call it matrices, rest, or give it parameters",
    ],
    [
      [{ name: 'x', algorithm: 'sgd', parameters: ['block.*', 'd?'] }],
      "group 'x': no parameter of the run matches 'd?'",
    ],
    [
      [{ name: 'x', algorithm: 'sgd', parameters: 'c' }],
      "group 'x': parameters is 'c', expected a list of names or patterns",
    ],
    [
      [{ name: 'x', algorithm: 'sgd', parameters: [] }],
      "group 'x': parameters is [], expected a list of names or patterns",
    ],
    [
      [
        { name: 'rest', algorithm: 'sgd' },
        { name: 'x', algorithm: 'adamw', parameters: ['c'] },
      ],
      "parameter 'c' is taken by group 'rest' and by group 'x'",
    ],
    [
      [{ name: 'x', algorithm: 'muon', parameters: ['c'] }],
      /^parameter 'c' has shape \[ 30 \], muon needs at least two dimensions/,
    ],
    [[{ name: 'rest', algorithm: 'adagrad' }], /^group 'rest': algorithm is 'adagrad', expected one of/],
    [[{ name: 'rest', algorithm: 5 }], "group 'rest': algorithm is 5, expected a text"],
    [[{ name: 'rest', preset: 'none' }], /^group 'rest': preset is 'none', expected one of/],
    [[{ name: 'rest', algorithm: 'sgd', betas: [0, 0] }], /^group 'rest': 'betas' is no hyperparameter of sgd/],
    [
      [
        { name: 'rest', algorithm: 'sgd' },
        { name: 'rest', algorithm: 'sgd' },
      ],
      "there are two groups 'rest'",
    ],
    [
      [{ name: 'rest', algorithm: 'sgd', lr_schedule: 'cosine' }],
      "group 'rest': lr_schedule is 'cosine', expected constant or run",
    ],
    [
      [{ name: 'x', algorithm: 'sgd', lr_schedule: 'run', parameters: ['*'] }],
      "group 'x': lr_schedule is run, and its parameters are of the run's groups matrices, rest: which of them is followed?",
    ],
    ['a: [', /within a flow collection at line 2, column 1$/],
  ]
  for (const [groups, message] of cases) {
    const file = groupsFile(folder, groups)
    const expected = message instanceof RegExp ? message : `${file}: ${message}`
    const error = (await replaying(data, 'r', { groups: file }).catch((caught) => caught)) as Error
    t.equal(error.name, 'ConfigError')
    if (expected instanceof RegExp) t.match(error.message.slice(file.length + 2), expected)
    else t.equal(error.message, expected)
  }
  await t.rejects(replaying(data, 'r', { groups: `${folder}/none.json` }), { message: /none\.json: ENOENT/ })
})

t.test('gradients that the other groups cannot take end the replay with the step', async (t) => {
  const own = t.testdir({})
  const service = await recorder(own)
  const client = await RawClient.connect(service.url)
  await client.open({
    run: 'r',
    groups: [{ name: 'g', algorithm: 'muon' }],
    parameters: [{ name: 'p', shape: [2, 2], group: 'g' }],
  })
  await client.step(1, [normal(1, 4)])
  // Its square is no float32.
  await client.step(2, [normal(2, 4).map((value) => value * 1e30)])
  await client.close()
  await service.app.close()
  const file = groupsFile(own, [{ name: 'g', algorithm: 'adamw' }])
  t.match(await replaying(own, 'r'), { equal: true, steps_equal: 2 })
  await t.rejects(replaying(own, 'r', { groups: file }), {
    name: 'ConfigError',
    message:
      /^the other groups end at step 2: the gradient of parameter 'p' for step 2 holds NaN or Inf, or its update would$/,
  })
})

t.test('a schedule that is 0 makes nothing, and nothing has an angle', async (t) => {
  const own = t.testdir({})
  const service = await recorder(own)
  const client = await RawClient.connect(service.url)
  const groups = [{ name: 'g', algorithm: 'muon', lr: 0 }]
  await client.open({ run: 'r', groups, parameters: [{ name: 'p', shape: [2, 2], group: 'g' }] })
  await client.step(1, [normal(1, 4)])
  await client.close()
  await service.app.close()
  const file = groupsFile(own, [{ name: 'g', algorithm: 'sgd', lr: 1, lr_schedule: 'run' }])
  const { steps } = await replaying(own, 'r', { groups: file })
  t.same(steps[0]!.rows.g!.alternative, { lr: 0, update_norm: 0, update_rms: 0 })
  const text = await printed(own, 'r', { groups: file })
  t.match(text, /\n1 step computed again: /)
  t.match(text, / +0 +0 +0 +- +-\n/)
})
