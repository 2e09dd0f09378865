import { ServiceError } from '../errors.js'
import type { AttentionDeclaration, RowsDeclaration } from '../wire/frame.js'
import { isNumber } from './coefficients.js'
import { checkName, show } from './hyperparameters.js'
import { isPositive, type Parameter } from './parameter.js'

/** Rows of a parameter from `first_row` on, head after head; how many there are follows from the attention. */
export type Rows = { readonly parameter: number; readonly first_row: number }

const SIMPLE_RULES = ['mha', 'gqa', 'gqa_group_min', 'gqa_min_key'] as const
type SimpleRule = (typeof SIMPLE_RULES)[number]
const RULES: readonly string[] = [...SIMPLE_RULES, 'mla']

/**
 * How many rows one head has: `head_dim` in query and key. With rule `mla` a query head has `nope_dim` and then
 * `rope_dim` rows, and a key head `nope_dim` and then `value_dim`.
 */
type Heads =
  | { readonly rule: SimpleRule; readonly head_dim: number }
  | { readonly rule: 'mla'; readonly nope_dim: number; readonly rope_dim: number; readonly value_dim: number }

/** An attention that QK-clip watches, checked, with every default filled in. `threshold` is τ, a softmax input. */
export type Attention = Heads & {
  readonly name: string
  readonly threshold: number
  readonly query_heads: number
  readonly key_value_heads: number
  readonly query: Rows
  readonly key: Rows
  readonly query_bias?: Rows
  readonly key_bias?: Rows
}

const DEFAULT_THRESHOLD = 100

/** Most rows of a parameter that an attention may scale: their factors travel in one frame, beside `data`. */
export const MAX_SCALED_ROWS = 2 ** 20

const SIDES = { query: 'query', key: 'key', query_bias: 'query', key_bias: 'key' } as const
/** The key under which an attention has one of its tensors. */
export type TensorKey = keyof typeof SIDES
/** Whether a tensor makes the queries of an attention or its keys. */
export type Side = (typeof SIDES)[TensorKey]

/** The rows that an attention has in one of its tensors: `rows` of them from `first_row` on. */
export type Claim = Rows & { readonly attention: Attention; readonly key: TensorKey; readonly rows: number }

/**
 * Checks the attentions of an `open` against its parameters and fills in the defaults.
 * Throws PARAMETER_INVALID with the attention's name, the key and both values.
 */
export function parseAttentions(
  raw: readonly AttentionDeclaration[],
  parameters: readonly Parameter[],
): readonly Attention[] {
  const seen = new Map<string, number>()
  const attentions = raw.map((given, index) => {
    checkName(`attention ${index}`, given.name)
    const twin = seen.get(given.name)
    if (twin !== undefined) throw refusal(given.name, `is attention ${index} and has the name of attention ${twin}`)
    seen.set(given.name, index)
    return parse(given, parameters)
  })
  checkOverlaps(attentions.flatMap(claimsOf), parameters)
  return attentions
}

/** The rows of every tensor of an attention, a claim for each tensor. */
export function claimsOf(attention: Attention): Claim[] {
  return TENSORS.flatMap((key) => {
    const rows = attention[key]
    return rows ? [{ ...rows, attention, key, rows: heightOf(attention, SIDES[key]) }] : []
  })
}

export function sideOf({ key }: Claim): Side {
  return SIDES[key]
}

/** How many heads the attention has on a side. */
export function headsOf({ query_heads, key_value_heads }: Attention, side: Side): number {
  return side === 'query' ? query_heads : key_value_heads
}

/**
 * How many rows a parameter has for QK-clip, which gives each row a factor. A tensor of more than two dimensions is
 * read as one matrix of its first dimension by all others, or, with matrices 'batch', as its matrices one below the
 * other.
 */
export function rowsOf({ shape, matrices }: Parameter): number {
  const dimensions = matrices === 'batch' ? shape.slice(0, -1) : shape.slice(0, 1)
  return dimensions.reduce((product, size) => product * size, 1)
}

/** Bytes of the row factors that a parameter's update may carry (`row_scale`), by the parameter's index. */
export function rowScaleBytes(attentions: readonly Attention[], parameters: readonly Parameter[]): Map<number, number> {
  const scaled = new Set(attentions.flatMap(claimsOf).map(({ parameter }) => parameter))
  return new Map([...scaled].map((index) => [index, rowsOf(parameters[index]) * Float32Array.BYTES_PER_ELEMENT]))
}

/** The first difference between a run's attentions and a resuming client's; undefined where they are the same. */
export function attentionDifference(existing: readonly Attention[], given: readonly Attention[]): string | undefined {
  if (existing.length !== given.length) return `it has ${existing.length} attentions, ${given.length} given`
  return existing.map((attention, index) => difference(attention, given[index])).find((text) => text !== undefined)
}

const TENSORS = ['query', 'key', 'query_bias', 'key_bias'] as const satisfies readonly TensorKey[]

function parse(given: AttentionDeclaration, parameters: readonly Parameter[]): Attention {
  const { name, threshold = DEFAULT_THRESHOLD, query_heads, key_value_heads = query_heads } = given
  if (!isNumber(threshold) || threshold <= 0) {
    throw refusal(name, `has threshold ${threshold}, expected a finite float32 number above 0`)
  }
  checkHeads(name, query_heads, key_value_heads)
  const attention: Attention = {
    name,
    threshold,
    query_heads,
    key_value_heads,
    ...headsShape(given, key_value_heads),
    ...tensors(given),
  }
  for (const claim of claimsOf(attention)) checkRows(claim, parameters)
  return attention
}

function checkHeads(name: string, query_heads: number, key_value_heads: number): void {
  if (!isPositive(query_heads)) throw refusal(name, `has query_heads ${query_heads}, expected an integer from 1 on`)
  if (isPositive(key_value_heads) && query_heads % key_value_heads === 0) return
  throw refusal(name, `has key_value_heads ${key_value_heads}, expected a divisor of its query_heads ${query_heads}`)
}

function headsShape(given: AttentionDeclaration, key_value_heads: number): Heads {
  const { name, query_heads } = given
  const { rule = key_value_heads < query_heads ? 'gqa' : 'mha' } = given
  if (!RULES.includes(rule)) throw refusal(name, `has rule ${show(rule)}, expected one of ${RULES.join(', ')}`)
  if ((rule === 'mha' || rule === 'mla') && key_value_heads !== query_heads) {
    const heads = `key_value_heads ${key_value_heads} and query_heads ${query_heads}`
    throw refusal(name, `has rule ${rule}, ${heads}, expected as many of both`)
  }
  const simple = SIMPLE_RULES.find((known) => known === rule)
  forbid(given, simple ? MLA_DIMS : ['head_dim'], rule)
  if (simple) return { rule: simple, head_dim: dimension(given, 'head_dim', 1) }
  const [nope_dim, rope_dim, value_dim] = [1, 0, 0].map((least, i) => dimension(given, MLA_DIMS[i], least))
  return { rule: 'mla', nope_dim, rope_dim, value_dim }
}

const MLA_DIMS = ['nope_dim', 'rope_dim', 'value_dim'] as const
type Dim = 'head_dim' | (typeof MLA_DIMS)[number]

function forbid(given: AttentionDeclaration, keys: readonly Dim[], rule: string): void {
  const key = keys.find((name) => given[name] !== undefined)
  if (key !== undefined) throw refusal(given.name, `has ${key} ${given[key]}, but rule ${rule} has none: leave it out`)
}

function dimension(given: AttentionDeclaration, key: Dim, least: number): number {
  const value = given[key]
  if (value === undefined) throw refusal(given.name, `has no ${key}, expected the rows of one head`)
  if (Number.isSafeInteger(value) && value >= least) return value
  throw refusal(given.name, `has ${key} ${value}, expected an integer from ${least} on`)
}

function tensors({ query, key, query_bias, key_bias }: AttentionDeclaration) {
  return {
    query: complete(query),
    key: complete(key),
    ...(query_bias && { query_bias: complete(query_bias) }),
    ...(key_bias && { key_bias: complete(key_bias) }),
  }
}

function complete({ parameter, first_row = 0 }: RowsDeclaration): Rows {
  return { parameter, first_row }
}

function heightOf(attention: Attention, side: Side): number {
  const heads = headsOf(attention, side)
  if (attention.rule !== 'mla') return heads * attention.head_dim
  return heads * (attention.nope_dim + (side === 'query' ? attention.rope_dim : attention.value_dim))
}

function checkRows({ attention, key, parameter: index, first_row, rows }: Claim, parameters: readonly Parameter[]) {
  const { name } = attention
  const parameter = parameters[index]
  if (parameter === undefined) {
    throw refusal(name, `has ${key}.parameter ${index}, expected an index below ${parameters.length}`)
  }
  const where = `${show(parameter.name)} with shape ${show(parameter.shape)}`
  const fail = (message: string) => refusal(name, message, index)
  const rank = parameter.shape.length
  if (key === 'query' || key === 'key') {
    if (rank < 2) throw fail(`has ${key}.parameter ${index}, ${where}, expected two dimensions or more`)
  } else if (rank !== 1) {
    throw fail(`has ${key}.parameter ${index}, ${where}, expected one dimension`)
  }
  const height = rowsOf(parameter)
  if (height > MAX_SCALED_ROWS) {
    throw fail(`has ${key}.parameter ${index}, ${where}, which is ${height} rows, expected at most ${MAX_SCALED_ROWS}`)
  }
  if (first_row >= 0 && first_row + rows <= height) return
  const asked = `${key}.first_row ${first_row} and ${rows} rows there`
  throw fail(`has ${asked}, expected them within the ${height} rows of ${where}`)
}

function checkOverlaps(claims: Claim[], parameters: readonly Parameter[]): void {
  const sorted = claims.sort((a, b) => a.parameter - b.parameter || a.first_row - b.first_row)
  for (const [i, claim] of sorted.slice(1).entries()) {
    const before = sorted[i]
    if (before.parameter !== claim.parameter || before.first_row + before.rows <= claim.first_row) continue
    const other = `${before.key} of attention ${show(before.attention.name)}`
    const rows = (range: Claim) => `rows ${range.first_row} to ${range.first_row + range.rows - 1}`
    const where = `of parameter ${show(parameters[claim.parameter].name)}`
    const message = `has ${rows(claim)} ${where} in its ${claim.key}, ${other} has ${rows(before)}: they overlap`
    throw refusal(claim.attention.name, message, claim.parameter)
  }
}

const COMPARED = [
  ...(['name', 'threshold', 'rule', 'query_heads', 'key_value_heads'] as const),
  ...(['head_dim', ...MLA_DIMS] as const),
  ...TENSORS,
] as const

function difference(existing: Attention, given: Attention): string | undefined {
  const [before, after]: Readonly<Partial<Record<string, unknown>>>[] = [existing, given]
  const key = COMPARED.find((name) => JSON.stringify(before[name]) !== JSON.stringify(after[name]))
  return key && `attention ${show(existing.name)} has ${key} ${show(before[key])} in the run, ${show(after[key])} given`
}

function refusal(name: string, message: string, parameter?: number): ServiceError {
  const fields = parameter === undefined ? {} : { parameter }
  return new ServiceError('PARAMETER_INVALID', `attention ${show(name)} ${message}`, fields)
}
