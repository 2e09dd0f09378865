import t from 'tap'
import { explain, layoutName, layoutReason } from '../../src/optimizer/explanation.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../src/optimizer/parameter.js'
import type { ParameterDeclaration } from '../../src/wire/frame.js'

type Keys = Omit<ParameterDeclaration, 'name' | 'group'>
const PRESET = {
  ...parseGroup({ name: 'g', algorithm: 'muon', lr: 0.5, adjust_lr_fn: 'match_rms_adamw' }),
  preset: 'mine',
}

function explained(keys: Keys, group = parseGroup({ name: 'g', algorithm: 'muon' })) {
  const [parameter] = parseParameters([{ name: 'w', group: 'g', ...keys }], new Map([['g', group]]))
  const { why, ...facts } = explain(parameter!, group)
  t.equal(why.split(': ')[1], layoutReason(parameter!))
  return { layout: layoutName(parameter!), why, ...facts }
}

t.test('a matrix is one block with its factor, its state, decay and operations', async (t) => {
  t.same(explained({ shape: [32, 8] }), {
    layout: 'matrix',
    why: "group 'g' asks for muon: the tensor is one matrix",
    blocks: [{ count: 1, rows: 32, cols: 8, factor: 2 }],
    decay: 1e-3 * 0.1,
    state_bytes: 4 * 256,
    flops: 5 * (4 * 8 * 8 * 32 + 2 * 8 ** 3) + 13 * 256,
  })
})

t.test('every layout is named, with its blocks counted by size and a reason', async (t) => {
  const cases: [Keys, string, string, [count: number, rows: number, cols: number][]][] = [
    [{ shape: [6, 4], heads: 3 }, 'heads 3', 'each of its 3 heads is a matrix', [[3, 2, 4]]],
    [{ shape: [6, 4], split: [2, 2, 2] }, 'split 3', 'its rows are 3 fused matrices', [[3, 2, 4]]],
    [
      { shape: [6, 4], split: [4, 1, 1] },
      'split 3',
      'its rows are 3 fused matrices',
      [
        [1, 4, 4],
        [2, 1, 4],
      ],
    ],
    [
      { shape: [6, 4, 3, 3], matrices: 'flatten' },
      'flatten',
      'one matrix, its columns all dimensions but the first',
      [[1, 6, 36]],
    ],
    [{ shape: [5, 6, 4], matrices: 'batch' }, 'batch', 'a matrix per leading index', [[5, 6, 4]]],
    [
      { shape: [5, 6, 4], matrices: 'batch', heads: 2 },
      'batch, heads 2',
      'a matrix per leading index; each of its 2 heads is a matrix',
      [[10, 3, 4]],
    ],
  ]
  for (const [keys, layout, reason, blocks] of cases) {
    const facts = explained(keys)
    t.equal(facts.layout, layout)
    t.equal(facts.why, `group 'g' asks for muon: ${reason}`)
    t.same(
      facts.blocks.map(({ count, rows, cols }) => [count, rows, cols]),
      blocks,
      layout,
    )
  }
})

t.test('blocks that differ have each their own factor, lr 0 or not', async (t) => {
  for (const lr of [0, 0.5]) {
    const { blocks } = explained({ shape: [12, 4], split: [8, 4] }, parseGroup({ name: 'g', algorithm: 'muon', lr }))
    t.same(
      blocks.map(({ factor }) => factor),
      [Math.SQRT2, 1],
    )
  }
})

t.test('a preset is named, and its values are those that count', async (t) => {
  const { why, blocks, decay } = explained({ shape: [100, 4] }, PRESET)
  t.equal(why, "group 'g' asks for muon as in preset 'mine': the tensor is one matrix")
  t.same([blocks[0]?.factor, decay], [2, 0.05])
})

t.test('an elementwise algorithm has no blocks, on any shape', async (t) => {
  const adamw = parseGroup({ name: 'g', algorithm: 'adamw', lr: 1, weight_decay: 0.5 })
  const why = "group 'g' asks for adamw: each element for itself"
  t.same(explained({ shape: [] }, adamw), {
    layout: 'elements',
    why,
    blocks: [],
    decay: 0.5,
    state_bytes: 8,
    flops: 12,
  })
  t.match(explained({ shape: [3, 5, 2] }, adamw), { blocks: [], state_bytes: 240, flops: 360 })
})
