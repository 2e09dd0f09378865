import t from 'tap'
import { seal } from '../../src/store/checkpoint/manifest.js'
import { newIdentity, openIdentity, sealIdentity } from '../../src/store/identity.js'

const GROUP = { name: 'g', algorithm: 'sgd', given: { lr: 0.5 }, hyperparameters: { lr: 0.5, momentum: 0 } }
const BRANCH = { branch: 2, parent: 0, checkpoint: 'step-000000000005' }
const IDENTITY = {
  run: 'r',
  epoch: 3,
  branch: 4,
  branches: [BRANCH, { branch: 4, parent: 2, checkpoint: 'step-000000000007.1' }],
  replacement: { step: 4, groups: [GROUP], later: [{ ...GROUP, preset: 'torch' }] },
}

t.test('what a run remembers comes back as it was', async (t) => {
  for (const identity of [IDENTITY, newIdentity('r'), { ...IDENTITY, replacement: { step: 0, groups: [GROUP] } }])
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
    [{ other: 1 }, 'other is unknown'],
    [{ branch: -1 }, 'branch is -1, expected a count'],
    [{ branch: 3 }, 'branches[1].branch is 4, expected 3 to 3'],
    [{ branches: {} }, 'branches is {}, expected a list'],
    [{ branches: [{ ...BRANCH, branch: 0 }] }, 'branches[0].branch is 0, expected a count above 0'],
    [{ branches: [{ ...BRANCH, parent: 2 }] }, 'branches[0].branch is 2, expected 3 to 4'],
    [{ branches: [{ ...BRANCH, parent: '0' }] }, 'branches[0].parent is "0", expected a count'],
    [
      { branches: [{ ...BRANCH, checkpoint: '../5' }] },
      'branches[0].checkpoint is "../5", expected the id of a checkpoint',
    ],
    [{ branches: [BRANCH, BRANCH] }, 'branches[1].branch is 2, expected 3 to 4'],
    [{ replacement: null }, 'replacement is null, expected a map'],
    [{ replacement: [] }, 'replacement is [], expected a map'],
    ...(
      [
        [{ step: -1, groups: [] }, 'step is -1, expected a count'],
        [{ step: 1, groups: {} }, 'groups is {}, expected a list'],
        [{ step: 1, groups: [null] }, 'groups[0] is null, expected a map'],
        [{ step: 1, groups: [{ ...GROUP, algorithm: 5 }] }, 'groups[0].algorithm is 5, expected a text'],
        [{ step: 1, groups: [{ ...GROUP, name: undefined }] }, 'groups[0].name is undefined, expected a text'],
        [{ step: 1, groups: [{ ...GROUP, preset: 1 }] }, 'groups[0].preset is 1, expected a text'],
        [{ step: 1, groups: [{ ...GROUP, given: [] }] }, 'groups[0].given is [], expected a map'],
        [
          { step: 1, groups: [{ ...GROUP, hyperparameters: 'lr' }] },
          'groups[0].hyperparameters is "lr", expected a map',
        ],
        [{ step: 1, groups: [GROUP], later: [{}] }, 'later[0].name is undefined, expected a text'],
        [{ step: 1, groups: [GROUP], since: 1 }, 'since is unknown'],
      ] as const
    ).map(([replacement, problem]): [object, string] => [{ replacement }, `replacement.${problem}`]),
    [{ format: 2 }, 'has format 2, this version reads 1'],
  ]
  for (const [change, problem] of cases) {
    const text = seal({ format: 1, ...IDENTITY, ...change })
    const attempt = () => openIdentity(text, 'run.json', 'r')
    const separator = problem.startsWith('has') ? ' ' : ': '
    t.throws(attempt, { name: 'UnreadableError', message: `run.json${separator}${problem}` }, problem)
  }
})
