import fc from 'fast-check'
import t from 'tap'
import {
  type Attention,
  attentionDifference,
  claimsOf,
  MAX_SCALED_ROWS,
  parseAttentions,
  rowScaleBytes,
  rowsOf,
} from '../../src/optimizer/attention.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../src/optimizer/parameter.js'
import type { AttentionDeclaration, ParameterDeclaration } from '../../src/wire/frame.js'

const GROUPS = new Map([
  ['m', parseGroup({ name: 'm', algorithm: 'muonclip' })],
  ['a', parseGroup({ name: 'a', algorithm: 'adamw' })],
])
const SHAPES: Omit<ParameterDeclaration, 'name'>[] = [
  { shape: [24, 16], group: 'm' },
  { shape: [24, 16], group: 'm' },
  { shape: [96], group: 'a' },
  { shape: [4, 12, 8], group: 'm', matrices: 'batch' },
  { shape: [24, 2, 3], group: 'm', matrices: 'flatten' },
  { shape: [], group: 'a' },
  { shape: [MAX_SCALED_ROWS + 1, 1], group: 'a' },
]
const PARAMETERS = parseParameters(
  SHAPES.map((shape, i) => ({ name: `p${i}`, ...shape })),
  GROUPS,
)

const QUERY = { parameter: 0 }
const KEY = { parameter: 1 }
const MHA: AttentionDeclaration = { name: 'a', query_heads: 4, head_dim: 6, query: QUERY, key: KEY }
const { head_dim: _, ...BARE } = MHA
const MLA: AttentionDeclaration = { ...BARE, rule: 'mla', nope_dim: 4, rope_dim: 2, value_dim: 2 }
const parse = (...given: AttentionDeclaration[]) => parseAttentions(given, PARAMETERS)

t.test('what is left out has its default', async (t) => {
  const rows = { query: { parameter: 0, first_row: 0 }, key: { parameter: 1, first_row: 0 } }
  t.same(parse(MHA), [{ ...MHA, threshold: 100, rule: 'mha', key_value_heads: 4, ...rows }])
  t.match(parse({ ...MHA, key_value_heads: 2 }), [{ rule: 'gqa', key_value_heads: 2 }])
  t.same(parse(), [])
  const full: Attention[] = [
    {
      ...{ name: 'full', threshold: 0.5, rule: 'mla', query_heads: 4, key_value_heads: 4 },
      ...{ nope_dim: 4, rope_dim: 0, value_dim: 0, ...rows },
      ...{ query_bias: { parameter: 2, first_row: 8 }, key_bias: { parameter: 2, first_row: 32 } },
    },
  ]
  t.same(parse(...full), full, 'what has everything stays as it is')
})

t.test('rows of a head and the number of heads say how many rows each tensor has', async (t) => {
  const heights = (given: AttentionDeclaration) => claimsOf(parse(given)[0]!).map(({ key, rows }) => [key, rows])
  t.same(heights(MHA), [
    ['query', 24],
    ['key', 24],
  ])
  t.same(
    heights({ ...MHA, key_value_heads: 2, query_bias: { parameter: 2 }, key_bias: { parameter: 2, first_row: 24 } }),
    [
      ['query', 24],
      ['key', 12],
      ['query_bias', 24],
      ['key_bias', 12],
    ],
  )
  t.same(heights({ ...MLA, rope_dim: 1, value_dim: 2 }), [
    ['query', 20],
    ['key', 24],
  ])
})

t.test('the rows of a parameter are its first dimension, or those of its matrices one below the other', async (t) => {
  t.same(
    PARAMETERS.slice(0, 5).map((parameter) => rowsOf(parameter)),
    [24, 24, 96, 48, 24],
  )
  t.same(
    [...rowScaleBytes(parse({ ...MHA, query_bias: { parameter: 2 }, key: { parameter: 3 } }), PARAMETERS)],
    [
      [0, 4 * 24],
      [3, 4 * 48],
      [2, 4 * 96],
    ],
  )
})

const LONG = 'x'.repeat(2000)
const REFUSED: [what: string, given: AttentionDeclaration[], ...message: string[]][] = [
  ['an empty name', [{ ...MHA, name: '' }], 'attention 0', '0 characters'],
  ['a long name', [{ ...MHA, name: LONG }], '2000 characters'],
  ['a name twice', [MHA, { ...MHA, query: { parameter: 3 } }], `'a'`, 'attention 1', 'attention 0'],
  ...[0, -1, Number.NaN, Infinity, 1e39].map((threshold): (typeof REFUSED)[number] => {
    return [`threshold ${threshold}`, [{ ...MHA, threshold }], `'a' has threshold ${threshold}`]
  }),
  ...[0, -4, 2 ** 53].map((query_heads): (typeof REFUSED)[number] => {
    return [`${query_heads} heads`, [{ ...MHA, query_heads }], `query_heads ${query_heads}`]
  }),
  ...[0, -2, 3, 8].map((key_value_heads): (typeof REFUSED)[number] => {
    return [`${key_value_heads} key heads`, [{ ...MHA, key_value_heads }], `key_value_heads ${key_value_heads}`, '4']
  }),
  ['an unknown rule', [{ ...MHA, rule: 'toString' }], `rule 'toString'`, 'mha, gqa, gqa_group_min, gqa_min_key, mla'],
  ['mha with fewer key heads', [{ ...MHA, rule: 'mha', key_value_heads: 2 }], 'rule mha', 'key_value_heads 2'],
  ['mla with fewer key heads', [{ ...MLA, key_value_heads: 2 }], 'rule mla', 'query_heads 4'],
  ['no head_dim', [BARE], 'no head_dim'],
  ['head_dim 0', [{ ...MHA, head_dim: 0 }], 'head_dim 0', 'from 1 on'],
  ['a negative head_dim', [{ ...MHA, head_dim: -6 }], 'head_dim -6'],
  ['nope_dim 0', [{ ...MLA, nope_dim: 0 }], 'nope_dim 0', 'from 1 on'],
  ['a negative rope_dim', [{ ...MLA, rope_dim: -1 }], 'rope_dim -1', 'from 0 on'],
  ['mla without value_dim', [{ ...MLA, value_dim: undefined }], 'no value_dim'],
  ['mla with head_dim', [{ ...MLA, head_dim: 6 }], 'head_dim 6', 'rule mla', 'leave it out'],
  ['nope_dim without mla', [{ ...MHA, nope_dim: 4 }], 'nope_dim 4', 'rule mha'],
  ['value_dim 0 with gqa', [{ ...MHA, key_value_heads: 2, value_dim: 0 }], 'value_dim 0', 'rule gqa'],
  ['an unknown parameter', [{ ...MHA, key: { parameter: 7 } }], 'key.parameter 7', 'below 7'],
  ['a bias as weights', [{ ...MHA, query: { parameter: 2 } }], 'query.parameter 2', 'two dimensions'],
  ['a scalar as weights', [{ ...MHA, key: { parameter: 5 } }], 'key.parameter 5', 'shape []'],
  ['weights as a bias', [{ ...MHA, key_bias: { parameter: 3 } }], 'key_bias.parameter 3', 'one dimension'],
  ['a row too many', [{ ...MHA, query: { parameter: 0, first_row: 1 } }], 'query.first_row 1', '24 rows'],
  ['a negative row', [{ ...MHA, key: { parameter: 3, first_row: -1 } }], 'key.first_row -1', '48 rows'],
  ['a head too many', [{ ...MHA, query_heads: 5 }], '30 rows', '24 rows'],
  [
    'rows beyond a bias',
    [{ ...MHA, query_bias: { parameter: 2, first_row: 73 } }],
    'query_bias.first_row 73',
    '96 rows',
  ],
  ['value rows beyond kv_b', [{ ...MLA, value_dim: 3 }], 'key.first_row 0', '28 rows', '24 rows'],
  ['too many rows', [{ ...MHA, query: { parameter: 6 } }], `${MAX_SCALED_ROWS + 1} rows`, `at most ${MAX_SCALED_ROWS}`],
  ['query and key in the same rows', [{ ...MHA, key: QUERY }], 'overlap', 'rows 0 to 23', `'p0'`],
  [
    'query and key that overlap by one row',
    [{ ...MHA, query: { parameter: 3 }, key: { parameter: 3, first_row: 23 } }],
    'rows 23 to 46',
    'rows 0 to 23',
  ],
  [
    'biases that overlap',
    [{ ...MHA, query_bias: { parameter: 2, first_row: 20 }, key_bias: { parameter: 2 } }],
    'query_bias',
    'key_bias',
    'overlap',
  ],
  [
    'two attentions with one key',
    [MHA, { ...MHA, name: 'b', query: { parameter: 3 } }],
    `'b' has rows 0 to 23`,
    `key of attention 'a'`,
  ],
  [
    'a range inside another',
    [
      { ...MHA, query: { parameter: 3 } },
      { ...MHA, name: 'b', query_heads: 1, query: { parameter: 3, first_row: 6 }, key: { parameter: 4 } },
    ],
    'rows 6 to 11',
  ],
]

for (const [what, given, ...message] of REFUSED) {
  t.test(`${what}: refused with the attention, the key and both values`, async (t) => {
    const error = t.throws(() => parse(...given), { code: 'PARAMETER_INVALID' })
    for (const part of message) t.ok(String(error).includes(part), `${error} says ${part}`)
    t.ok(String(error).length < 500)
  })
}

t.test('rows side by side are no overlap, in one attention and in two', async (t) => {
  const half = { query_heads: 2, head_dim: 6 }
  const at = (first_row: number) => ({ parameter: 3, first_row })
  const pair = [0, 1].map((i) => ({ name: `h${i}`, ...half, query: at(24 * i), key: at(24 * i + 12) }))
  t.equal(parse(...pair).length, 2)
})

t.test('hostile numbers never cost more than a refusal', async () => {
  const int = fc.oneof(fc.integer(), fc.maxSafeInteger(), fc.nat(30))
  const rows = fc.record({ parameter: fc.nat(8), first_row: int })
  const attention = fc.record({
    ...{ name: fc.string(), query_heads: int, key_value_heads: int, head_dim: fc.option(int, { nil: undefined }) },
    ...{
      rule: fc.constantFrom(undefined, 'mla', 'gqa', 'gqa_min_key'),
      query: rows,
      key: rows,
      threshold: fc.double(),
    },
    ...{ nope_dim: fc.option(int, { nil: undefined }), rope_dim: int, value_dim: int },
  })
  const property = fc.property(fc.array(attention), (given) => {
    try {
      return parse(...given).length === given.length
    } catch (error) {
      return error instanceof Error && 'code' in error && error.code === 'PARAMETER_INVALID'
    }
  })
  fc.assert(property, { seed: 5, numRuns: 2000 })
})

t.test('the first difference between two lists of attentions is named', async (t) => {
  const [before] = parse({ ...MHA, query_bias: { parameter: 2 } })
  const difference = (change: Partial<AttentionDeclaration>) =>
    attentionDifference([before!], parse({ ...MHA, query_bias: { parameter: 2 }, ...change }))
  t.equal(difference({}), undefined)
  t.equal(difference({ threshold: 100, rule: 'mha', key_value_heads: 4 }), undefined, 'a default that is given is none')
  const changes: [Partial<AttentionDeclaration>, string][] = [
    [{ name: 'b' }, `attention 'a' has name 'a' in the run, 'b' given`],
    [{ threshold: 50 }, `attention 'a' has threshold 100 in the run, 50 given`],
    [{ rule: 'gqa' }, `has rule 'mha' in the run, 'gqa' given`],
    [{ query_heads: 2 }, 'has query_heads 4 in the run, 2 given'],
    [{ key_value_heads: 2, rule: 'gqa' }, `has rule 'mha'`],
    [{ head_dim: 5 }, 'has head_dim 6 in the run, 5 given'],
    [
      { query: { parameter: 4 } },
      'has query { parameter: 0, first_row: 0 } in the run, { parameter: 4, first_row: 0 }',
    ],
    [{ key: { parameter: 3, first_row: 1 } }, 'has key {'],
    [{ query_bias: undefined }, 'has query_bias { parameter: 2, first_row: 0 } in the run, undefined given'],
    [{ key_bias: { parameter: 2, first_row: 24 } }, 'has key_bias undefined in the run'],
  ]
  for (const [change, message] of changes) t.match(difference(change), message, JSON.stringify(change))
  t.equal(attentionDifference([before!], []), 'it has 1 attentions, 0 given')
  const [mla] = parse(MLA)
  t.match(attentionDifference([mla!], parse({ ...MLA, rope_dim: 1 })), 'has rope_dim 2 in the run, 1 given')
})
