import fc from 'fast-check'
import t from 'tap'
import { mostShards, parameterCost, placeShards } from '../../src/cluster/placement.js'
import { balanceOf, MODELS, modelOf, UNEVEN } from './models.js'

const BOUND = 1.05

for (const model of MODELS) {
  t.test(`${model.name}: no shard costs more than ${BOUND} of the mean`, async (t) => {
    for (const shards of [2, 4, 8]) t.ok(balanceOf(model, shards).cost <= BOUND, `${shards} shards`)
  })
}

t.test('what one parameter is most of cannot be even: no placement of whole parameters is better', async (t) => {
  const [embedding, , stack] = UNEVEN
  for (const [model, shards] of [
    [embedding, 4],
    [embedding, 8],
    [stack, 2],
    [stack, 8],
  ] as const) {
    const { cost, least } = balanceOf(model!, shards)
    t.ok(least > BOUND, `${model!.name} over ${shards}: ${least}`)
    t.ok(Math.abs(cost - least) < 1e-9, `${cost}`)
  }
})

t.test('a stack of experts is one parameter, and lies in one shard', async (t) => {
  const [, stack] = UNEVEN
  t.equal(mostShards(stack!.parameters, []), 1)
  t.throws(() => placeShards(stack!.parameters, [], 2), {
    code: 'PARAMETER_INVALID',
    message: /cannot be cut into 2 shards: it has 1 parameters, .*Ask for at most 1 shards/,
  })
})

const attention = (name: string, query: number, key: number) => {
  return { name, query_heads: 1, head_dim: 2, query: { parameter: query }, key: { parameter: key, first_row: 2 } }
}

t.test('the parameters of an attention stay together, and those of attentions that share one', async (t) => {
  const parameters = Array.from({ length: 6 }, (_, i) => ({ name: `p${i}`, shape: [4, 2], group: 'adamw' }))
  const { attentions, ...model } = modelOf('m', parameters, [attention('a', 0, 4), attention('b', 5, 3)])
  for (const shards of [2, 3, 4]) {
    const placed = placeShards(model.parameters, attentions, shards)
    for (const together of [
      [0, 4],
      [3, 5],
    ])
      t.equal(placed.filter((indices) => together.some((index) => indices.includes(index))).length, 1)
  }
  t.equal(mostShards(model.parameters, attentions), 4)
  const chained = modelOf('m', parameters, [attention('a', 0, 4), attention('b', 5, 3), attention('c', 4, 5)])
  t.same(placeShards(chained.parameters, chained.attentions, 2), [
    [0, 3, 4, 5],
    [1, 2],
  ])
})

t.test('each parameter is in one shard, no shard is empty, and equal arguments give equal answers', async () => {
  const sizes = fc.array(fc.integer({ min: 1, max: 64 }), { minLength: 1, maxLength: 40 })
  fc.assert(
    fc.property(sizes, fc.integer({ min: 1, max: 40 }), (sizes, wish) => {
      const shards = Math.min(wish, sizes.length)
      const { parameters } = modelOf(
        'm',
        sizes.map((size, i) => ({ name: `${i}`, shape: [size, size], group: i % 2 === 0 ? 'muon' : 'adamw' })),
      )
      const placed = placeShards(parameters, [], shards)
      const all = placed.flat().sort((one, other) => one - other)
      if (JSON.stringify(all) !== JSON.stringify([...sizes.keys()])) throw new Error(`placed are ${all}`)
      if (placed.length !== shards || placed.some(({ length }) => length === 0)) throw new Error('a shard is empty')
      if (placed.some((indices) => indices.some((index, i) => index <= (indices[i - 1] ?? -1))))
        throw new Error('not ascending')
      if (JSON.stringify(placeShards(parameters, [], shards)) !== JSON.stringify(placed)) throw new Error('another one')
      // Graham 1969: the largest first is at most 4/3 of the best, which is no better than the mean or the largest.
      const costs = parameters.map(parameterCost)
      const mean = costs.reduce((sum, cost) => sum + cost, 0) / shards
      const most = Math.max(...placed.map((indices) => indices.reduce((sum, index) => sum + costs[index]!, 0)))
      if (shards < sizes.length && most > mean + Math.max(...costs)) throw new Error(`${most} of a mean of ${mean}`)
    }),
    { seed: 2, numRuns: 200 },
  )
})

t.test('the cost: Newton–Schulz, and 100 operations for each byte that is moved', async (t) => {
  const { parameters } = modelOf('m', [
    { name: 'w', shape: [3, 5], group: 'muon' },
    { name: 'b', shape: [7], group: 'adamw', gradient_dtype: 'bfloat16' },
  ])
  const flops = 5 * (4 * 3 ** 2 * 5 + 2 * 3 ** 3)
  t.same(parameters.map(parameterCost), [flops + 100 * (2 * 60 + 2 * 60 + 2 ** 15), 100 * (14 + 28 + 2 * 56 + 2 ** 15)])
})
