import t from 'tap'
import { normal, RawClient, type ReceivedUpdate, startService } from '../service.js'

const service = await startService()
t.teardown(() => service.app.close())

const GROUPS = [
  { name: 'clip', algorithm: 'muonclip', lr: 0.5 },
  { name: 'rest', algorithm: 'adamw', lr: 0.5 },
]
const factorsOf = ({ row_scale }: ReceivedUpdate) =>
  row_scale ? [...new Float32Array(Uint8Array.from(row_scale).buffer)] : []
/** `count` times 1. */
const ones = (count: number): number[] => new Array(count).fill(1)
const elements = (shape: readonly number[]) => shape.reduce((product, size) => product * size, 1)

t.test('fused rows that are split for Muon get what the separate query, key and value get', async (t) => {
  const client = await RawClient.connect(service.url)
  t.teardown(() => client.close())
  // Two key heads for four query heads: 8 rows of queries, 4 of keys, 4 of values.
  const heights = [8, 4, 4]
  const heads = { threshold: 1, query_heads: 4, key_value_heads: 2, head_dim: 2, rule: 'gqa_min_key' }
  const opened = await client.open({
    run: 'fused',
    groups: GROUPS.map((group) => ({ ...group, ...(group.name === 'clip' && { adjust_lr_fn: 'none' }) })),
    parameters: [
      { name: 'qkv', shape: [16, 6], group: 'clip', split: heights },
      ...heights.map((rows, i) => ({ name: 'qkv'[i]!, shape: [rows, 6], group: 'clip' })),
    ],
    attentions: [
      { name: 'fused', ...heads, query: { parameter: 0 }, key: { parameter: 0, first_row: 8 } },
      { name: 'apart', ...heads, query: { parameter: 1 }, key: { parameter: 2 } },
    ],
  })
  t.match(opened.groups.clip, { algorithm: 'muonclip', momentum_form: 'heavy_ball' })
  for (const step of [1, 2, 3]) {
    const logits = [16, 1, 4 * step, 0.5]
    const whole = normal(step, 96)
    const parts = [whole.slice(0, 48), whole.slice(48, 72), whole.slice(72)]
    client.send({ type: 'step', step, max_logits: { fused: logits, apart: logits } })
    t.match(await client.step(step, [whole, ...parts]), { clipped_heads: { fused: 2, apart: 2 } })
    const [fused, ...apart] = [0, 1, 2, 3].map((index) => client.updates.get(index)!)
    t.equal(Buffer.compare(fused!.data, Buffer.concat(apart.map(({ data }) => data))), 0, 'the same bits')
    t.same(factorsOf(fused!), [...factorsOf(apart[0]!), ...factorsOf(apart[1]!), ...ones(4)])
    t.same(factorsOf(apart[2]!), [], 'values are not scaled')
    t.same(factorsOf(apart[1]!).slice(0, 2), [0.25, 0.25])
  }
})

t.test('rows of stacked and of flattened matrices are counted one matrix below the other', async (t) => {
  const client = await RawClient.connect(service.url)
  t.teardown(() => client.close())
  const parameters = [
    { name: 'experts', shape: [4, 6, 5], group: 'clip', matrices: 'batch' },
    { name: 'kernel', shape: [8, 2, 3], group: 'clip', matrices: 'flatten' },
    { name: 'stack', shape: [6, 2, 2], group: 'rest' },
    { name: 'heads', shape: [9, 4], group: 'clip', heads: 3 },
  ]
  await client.open({
    run: 'stacked',
    groups: GROUPS,
    parameters,
    attentions: [
      // Rows 5 to 10 of 24: the last of the first expert and five of the second.
      {
        ...{ name: 'across', threshold: 1, query_heads: 2, head_dim: 3 },
        ...{ query: { parameter: 0, first_row: 5 }, key: { parameter: 1, first_row: 1 } },
      },
      {
        ...{ name: 'last', threshold: 1, query_heads: 1, head_dim: 2, rule: 'gqa' },
        ...{ query: { parameter: 0, first_row: 22 }, key: { parameter: 2, first_row: 4 } },
      },
      {
        ...{ name: 'rest', threshold: 1, query_heads: 2, head_dim: 2 },
        ...{ query: { parameter: 2 }, key: { parameter: 3, first_row: 5 } },
      },
    ],
  })
  client.send({ type: 'step', step: 1, max_logits: { across: [1, 16], last: [4], rest: [256, -1] } })
  const gradients = parameters.map(({ shape }, i) => normal(i, elements(shape)))
  t.match(await client.step(1, gradients), { clipped_heads: { across: 1, last: 1, rest: 1 } })
  const quarter = [0.25, 0.25, 0.25]
  t.same(
    parameters.map((_, index) => factorsOf(client.updates.get(index)!)),
    [
      [...ones(8), ...quarter, ...ones(11), 0.25, 0.25],
      [...ones(4), ...quarter, 1],
      [1 / 16, 1 / 16, ...ones(4)],
      [...ones(5), 1 / 16, 1 / 16, 1, 1],
    ],
  )
})
