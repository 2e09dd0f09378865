import t from 'tap'
import { seal } from '../../src/store/checkpoint/manifest.js'
import { openIdentity, sealIdentity } from '../../src/store/identity.js'

const GROUP = { name: 'g', algorithm: 'sgd', given: { lr: 0.5 }, hyperparameters: { lr: 0.5, momentum: 0 } }
const IDENTITY = {
  run: 'r',
  epoch: 3,
  replacement: { step: 4, groups: [GROUP], later: [{ ...GROUP, preset: 'torch' }] },
}

t.test('what a run remembers comes back as it was', async (t) => {
  for (const identity of [IDENTITY, { run: 'r', epoch: 0 }, { ...IDENTITY, replacement: { step: 0, groups: [GROUP] } }])
    t.same(openIdentity(sealIdentity(identity), 'run.json', 'r'), identity)
})

t.test('a byte that is not what was written is found, whichever it is', async (t) => {
  const text = sealIdentity(IDENTITY)
  for (let at = 0; at < text.length; at++) {
    const other = `${text.slice(0, at)}${text[at] === '1' ? '2' : '1'}${text.slice(at + 1)}`
    t.throws(() => openIdentity(other, 'run.json', 'r'), { name: 'UnreadableError' }, `byte ${at}`)
    t.throws(() => openIdentity(text.slice(0, at), 'run.json', 'r'), { name: 'UnreadableError' }, `${at} bytes`)
  }
})

t.test('a hash that is right does not make values right', async (t) => {
  const cases: [object, string][] = [
    [{ epoch: 'x' }, 'epoch is "x", expected a count'],
    [{ epoch: -5 }, 'epoch is -5, expected a count'],
    [{ epoch: 1.5 }, 'epoch is 1.5, expected a count'],
    [{ epoch: 2 ** 60 }, 'epoch is 1152921504606847000, expected a count'],
    [{ epoch: undefined }, 'epoch is undefined, expected a count'],
    [{ run: 's' }, `run is "s", expected 'r' as its folder is called`],
    [{ replacement: null }, 'replacement is null, expected a step and groups'],
    [{ replacement: [] }, 'replacement is [], expected a step and groups'],
    ...[
      { step: -1, groups: [] },
      { step: 1, groups: {} },
      { step: 1, groups: [null] },
      { step: 1, groups: [{ ...GROUP, algorithm: 5 }] },
      { step: 1, groups: [{ ...GROUP, name: undefined }] },
      { step: 1, groups: [{ ...GROUP, preset: 1 }] },
      { step: 1, groups: [{ ...GROUP, given: [] }] },
      { step: 1, groups: [{ ...GROUP, hyperparameters: 'lr' }] },
      { step: 1, groups: [GROUP], later: [{}] },
    ].map((replacement): [object, string] => {
      return [{ replacement }, `replacement is ${JSON.stringify(replacement)}, expected a step and groups`]
    }),
    [{ format: 2 }, 'has format 2, this version reads 1'],
  ]
  for (const [change, problem] of cases) {
    const text = seal({ format: 1, ...IDENTITY, ...change })
    const attempt = () => openIdentity(text, 'run.json', 'r')
    const separator = problem.startsWith('has') ? ' ' : ': '
    t.throws(attempt, { name: 'UnreadableError', message: `run.json${separator}${problem}` }, problem)
  }
})
