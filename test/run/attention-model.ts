// Attention logits in float64, with rotary embeddings, computed from the definitions: the numbers that QK-clip bounds.
import type { AttentionDeclaration } from '../../src/wire/frame.js'
import { normal } from '../service.js'

export const TOKENS = 5
const WIDTH = 12

export type Values = readonly ArrayLike<number>[]

/** A declared attention, its parameters' shapes, and the logits of each query head for all pairs of tokens. */
export type Model = {
  attention: AttentionDeclaration
  shapes: readonly (readonly number[])[]
  logits: (values: Values) => Float64Array[]
}

/** Rotary embeddings (arXiv 2104.09864): pairs (i, i + d/2) of the vector of a token turn by position · 100^(-2i/d). */
function rotate(vector: readonly number[], position: number): number[] {
  const half = vector.length / 2
  return vector.map((value, i) => {
    const angle = position * 100 ** (-(i % half) / half)
    const other = i < half ? -vector[i + half]! : vector[i - half]!
    return value * Math.cos(angle) + other * Math.sin(angle)
  })
}

const dot = (a: readonly number[], b: readonly number[]) => a.reduce((sum, value, i) => sum + value * b[i]!, 0)

/** Rows `first` to `first + count` of W x + b for the input of one token. */
function project(rows: { weights: ArrayLike<number>; bias?: ArrayLike<number> }, first: number, count: number) {
  return (input: readonly number[]) =>
    Array.from({ length: count }, (_, i) => {
      const row = Array.from({ length: input.length }, (_, j) => rows.weights[(first + i) * input.length + j]!)
      return dot(row, input) + (rows.bias?.[first + i] ?? 0)
    })
}

const inputs = (seed: number, width: number) =>
  Array.from({ length: TOKENS }, (_, token) => [...normal(seed + token, width)])

function pairs(queries: readonly number[][], keys: readonly number[][], scale: number): Float64Array {
  return Float64Array.from(queries.flatMap((query) => keys.map((key) => scale * dot(query, key))))
}

type FirstRow = { parameter: number; first_row: number }
type Simple = {
  query_heads: number
  key_value_heads: number
  head_dim: number
  query: FirstRow
  key: FirstRow
  query_bias?: FirstRow
  key_bias?: FirstRow
}

/** Every rule but mla: rotary embeddings over the whole head. */
function simple(attention: AttentionDeclaration & Simple, shapes: Model['shapes']): Model {
  const { query_heads, key_value_heads, head_dim, query, key, query_bias, key_bias } = attention
  const tokens = inputs(900, WIDTH)
  const side = (values: Values, [weights, bias]: [FirstRow, FirstRow | undefined], head: number) => {
    const from = bias && Float64Array.from(values[bias.parameter]!).subarray(bias.first_row)
    const rows = {
      weights: Float64Array.from(values[weights.parameter]!).subarray(WIDTH * weights.first_row),
      bias: from,
    }
    const vectors = tokens.map(project(rows, head * head_dim, head_dim))
    return vectors.map(rotate)
  }
  const logits = (values: Values) =>
    Array.from({ length: query_heads }, (_, head) => {
      const shared = Math.floor((head * key_value_heads) / query_heads)
      const queries = side(values, [query, query_bias], head)
      return pairs(queries, side(values, [key, key_bias], shared), head_dim ** -0.5)
    })
  return { attention, shapes, logits }
}

/**
 * DeepSeek-V2 (arXiv 2405.04434, section 2.1): q = [nope, rotated rope] per head, k = [nope, a rotated key for all].
 */
function latent(name: string, { biased }: { biased: boolean }): Model {
  const [heads, nope_dim, rope_dim, value_dim] = [3, 4, 2, 5]
  const [query, key] = [
    { parameter: 0, first_row: 0 },
    { parameter: 1, first_row: 0 },
  ]
  const [queryLatent, keyLatent] = [inputs(500, 7), inputs(600, 6)]
  const sharedKey = inputs(700, rope_dim).map(rotate)
  const queryRows = nope_dim + rope_dim
  const logits = ([q, kv, queryBias, keyBias]: Values) =>
    Array.from({ length: heads }, (_, head) => {
      const queries = queryLatent
        .map(project({ weights: q!, bias: queryBias }, head * queryRows, queryRows))
        .map((row, token) => [...row.slice(0, nope_dim), ...rotate(row.slice(nope_dim), token)])
      const keys = keyLatent
        .map(project({ weights: kv!, bias: keyBias }, head * (nope_dim + value_dim), nope_dim))
        .map((row, token) => [...row, ...sharedKey[token]!])
      return pairs(queries, keys, queryRows ** -0.5)
    })
  const [queryHeight, keyHeight] = [heads * queryRows, heads * (nope_dim + value_dim)]
  const weights = [
    [queryHeight, 7],
    [keyHeight, 6],
  ]
  const attention = { name, rule: 'mla', query_heads: heads, nope_dim, rope_dim, value_dim, query, key }
  if (!biased) return { attention, shapes: weights, logits }
  const biases = { query_bias: { parameter: 2, first_row: 0 }, key_bias: { parameter: 3, first_row: 0 } }
  return { attention: { ...attention, ...biases }, shapes: [...weights, [queryHeight], [keyHeight]], logits }
}

const at = (parameter: number, first_row = 0): FirstRow => ({ parameter, first_row })
const HEADS = { query_heads: 6, key_value_heads: 2, head_dim: 4 }
const SEPARATE = { query: at(0), key: at(1) }
const SHAPES = [
  [24, WIDTH],
  [8, WIDTH],
]

export const MODELS: readonly Model[] = [
  simple({ name: 'mha', ...HEADS, key_value_heads: 6, ...SEPARATE }, [SHAPES[0]!, SHAPES[0]!]),
  simple(
    {
      ...{ name: 'mha, fused, with biases', ...HEADS, query_heads: 2 },
      ...{ query: at(0, 8), key: at(0, 16), query_bias: at(1, 8), key_bias: at(1, 16) },
    },
    [[24, WIDTH], [24]],
  ),
  simple({ name: 'gqa', ...HEADS, ...SEPARATE }, SHAPES),
  simple({ name: 'one key for all', ...HEADS, key_value_heads: 1, ...SEPARATE }, [SHAPES[0]!, [4, WIDTH]]),
  simple({ name: 'gqa_group_min', rule: 'gqa_group_min', ...HEADS, ...SEPARATE }, SHAPES),
  simple({ name: 'gqa_min_key', rule: 'gqa_min_key', ...HEADS, ...SEPARATE }, SHAPES),
  simple({ name: 'gqa, with biases', ...HEADS, ...SEPARATE, query_bias: at(2), key_bias: at(3) }, [
    ...SHAPES,
    ...SHAPES.map(([rows]) => [rows!]),
  ]),
  latent('mla', { biased: false }),
  latent('mla, with biases', { biased: true }),
]
