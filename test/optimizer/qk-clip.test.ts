import t from 'tap'
import { parseAttentions } from '../../src/optimizer/attention.js'
import { parseGroup } from '../../src/optimizer/hyperparameters.js'
import { parseParameters } from '../../src/optimizer/parameter.js'
import { checkMaxLogits, claimsByParameter, clipSummary, isWithin, rowScale } from '../../src/optimizer/qk-clip.js'
import type { AttentionDeclaration } from '../../src/wire/frame.js'

const GROUPS = new Map([['g', parseGroup({ name: 'g', algorithm: 'sgd' })]])
const PARAMETERS = parseParameters(
  [[8, 2], [8, 2], [20], [8, 2]].map((shape, i) => ({ name: `p${i}`, shape, group: 'g' })),
  GROUPS,
)
const BASE = { name: 'a', threshold: 64, query: { parameter: 0 }, key: { parameter: 1 } }
const FOUR = { ...BASE, query_heads: 4, head_dim: 2 }
const TWO_KEYS = { ...FOUR, key_value_heads: 2 }

/** The factors of each parameter's rows, [] where there are none. */
function scales(given: AttentionDeclaration, logits: readonly number[]): number[][] {
  const attentions = parseAttentions([given], PARAMETERS)
  const claims = claimsByParameter(attentions)
  const checked = checkMaxLogits(attentions, { [given.name]: logits }, 1)
  return PARAMETERS.map((parameter) => {
    const bytes = rowScale(parameter, claims, checked)
    return bytes ? [...new Float32Array(bytes.buffer)] : []
  })
}

// γ is 1/4 for 256, 1/16 for 1024: every factor is exact.
const CASES: [what: string, AttentionDeclaration, number[], number[][]][] = [
  ['mha', FOUR, [256, 64, 1, 1024], [[0.5, 0.5, 1, 1, 1, 1, 0.25, 0.25], [0.5, 0.5, 1, 1, 1, 1, 0.25, 0.25], [], []]],
  ['gqa', TWO_KEYS, [256, 64, 1, 1024], [[0.25, 0.25, 1, 1, 1, 1, 1 / 16, 1 / 16], [], [], []]],
  [
    'gqa_group_min',
    { ...TWO_KEYS, rule: 'gqa_group_min' },
    [256, 64, 1, 1024],
    [[0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.25, 0.25, 1, 1, 1, 1], [], []],
  ],
  [
    'gqa_min_key',
    { ...TWO_KEYS, rule: 'gqa_min_key' },
    [256, 64, 256, 1024],
    [[0.5, 0.5, 1, 1, 0.5, 0.5, 0.25, 0.25], [0.5, 0.5, 0.25, 0.25, 1, 1, 1, 1], [], []],
  ],
  [
    'mla',
    {
      ...BASE,
      rule: 'mla',
      query_heads: 2,
      nope_dim: 1,
      rope_dim: 2,
      value_dim: 3,
      query: { parameter: 0, first_row: 1 },
    },
    [64, 256],
    [[1, 1, 1, 1, 0.5, 0.25, 0.25, 1], [1, 1, 1, 1, 0.5, 1, 1, 1], [], []],
  ],
  [
    'one key head for all',
    { ...FOUR, key_value_heads: 1, rule: 'gqa_group_min' },
    [1, 1, 256, 1],
    [[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 1, 1, 1, 1, 1, 1], [], []],
  ],
  [
    'fused rows and fused biases',
    {
      ...{ name: 'a', threshold: 64, query_heads: 2, head_dim: 1 },
      ...{ query: { parameter: 3, first_row: 2 }, key: { parameter: 3, first_row: 5 } },
      ...{ query_bias: { parameter: 2, first_row: 18 }, key_bias: { parameter: 2, first_row: 1 } },
    },
    [256, 1024],
    [[], [], [1, 0.5, 0.25, ...new Array(15).fill(1), 0.5, 0.25], [1, 1, 0.5, 0.25, 1, 0.5, 0.25, 1]],
  ],
]

for (const [what, attention, logits, expected] of CASES) {
  t.test(`${what}: each row has the factor of its head`, async (t) => {
    t.same(scales(attention, logits), expected)
  })
}

t.test('nothing is scaled by what is not above the threshold', async (t) => {
  const none = [[], [], [], []]
  for (const logits of [
    [64, 63, 0, -0],
    [-Infinity, -1, -1e30, -3e38],
  ])
    t.same(scales(FOUR, logits), none)
  t.same(scales(FOUR, [64 * (1 + 2 ** -40), 1, 1, 1]), none, 'a factor that rounds to 1 is 1')
})

t.test('no factor is 0, however large the logit', async (t) => {
  const [query] = scales({ ...TWO_KEYS, threshold: 1e-38 }, [3.4e38, 1, 1, 1])
  t.same(query!.slice(0, 2), [2 ** -126, 2 ** -126])
  t.equal(scales(FOUR, [3.4e38, 1, 1, 1])[0]![0], Math.fround(Math.sqrt(64 / 3.4e38)))
})

t.test('attentions of one parameter scale their own rows, each by its own threshold', async (t) => {
  const half = (name: string, first_row: number, threshold: number) => ({
    ...{ name, threshold, query_heads: 2, head_dim: 2 },
    ...{ query: { parameter: 0, first_row }, key: { parameter: 1, first_row } },
  })
  const attentions = parseAttentions([half('x', 4, 4), half('y', 0, 64)], PARAMETERS)
  const claims = claimsByParameter(attentions)
  const factors = (given: Record<string, number[]>) =>
    new Float32Array(rowScale(PARAMETERS[0]!, claims, checkMaxLogits(attentions, given, 1))!.buffer)
  t.same([...factors({ x: [16, 1], y: [1, 256] })], [1, 1, 0.5, 0.5, 0.5, 0.5, 1, 1])
  t.same([...factors({ x: [16, 16] })], [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5])
  const summary = (given: Record<string, number[]>) => clipSummary(attentions, checkMaxLogits(attentions, given, 1))
  t.same(summary({ x: [16, 1], y: [1, 256] }), { clipped_heads: { x: 1, y: 1 }, max_logit: 256 })
  t.same(summary({ y: [-3, -2] }), { clipped_heads: { y: 0 }, max_logit: -2 })
  t.same(summary({ x: [-Infinity, -Infinity] }), { clipped_heads: { x: 0 } })
  t.same(summary({}), { clipped_heads: {} })
})

t.test('max_logits that do not fit are refused with the attention, the head and the value', async (t) => {
  const attentions = parseAttentions([FOUR], PARAMETERS)
  const cases: [Record<string, number[]>, RegExp][] = [
    [{ a: [1, 2, 3] }, /'a': 3 numbers, expected 4/],
    [{ a: [] }, /0 numbers/],
    [{ a: [1, 2, 3, 4, 5] }, /5 numbers/],
    [{ a: [1, Number.NaN, 3, 4] }, /NaN for query head 1/],
    [{ a: [1, 2, 3, Infinity] }, /Infinity for query head 3/],
    [{ a: [1e39, 2, 3, 4] }, /1e\+39 for query head 0/],
    [{ a: [1, 2, 3, 4], b: [1] }, /'b': the run has no attention/],
    [{ constructor: [1, 2, 3, 4] }, /'constructor'/],
  ]
  for (const [given, message] of cases) {
    const refusal = { code: 'MAX_LOGITS_INVALID', message, fields: { step: 7 } }
    t.throws(() => checkMaxLogits(attentions, given, 7), refusal, String(message))
  }
  t.throws(() => checkMaxLogits([], { a: [1] }, 1), { code: 'MAX_LOGITS_INVALID' })
  t.equal(checkMaxLogits([], {}, 1).size, 0)
})

t.test('logits are within others where no head has a larger one', async (t) => {
  const bounds = new Map([['a', [1, 2]]])
  t.ok(isWithin(new Map([['a', [1, 1.5]]]), bounds))
  t.ok(isWithin(new Map(), bounds))
  t.notOk(isWithin(new Map([['a', [1, 2.5]]]), bounds))
  t.notOk(isWithin(new Map([['b', [0, 0]]]), bounds))
})
