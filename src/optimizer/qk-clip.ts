import { ServiceError } from '../errors.js'
import { type Attention, type Claim, claimsOf, headsOf, rowsOf, type Side, sideOf } from './attention.js'
import { show } from './hyperparameters.js'
import type { Parameter } from './parameter.js'

/** The largest softmax input of each query head in a step's batch, by the attention's name. */
export type MaxLogits = ReadonlyMap<string, readonly number[]>

/**
 * What a head's rows are multiplied with: `own` is the head's γ, `group` the smallest γ of the heads that share its
 * key.
 */
type Factor = (own: number, group: number) => number

/** `rows` consecutive rows of a head have one factor. */
type Part = { readonly rows: number; readonly factor: Factor }

const untouched: Factor = () => 1
const own: Factor = (gamma) => gamma
const ownRoot: Factor = (gamma) => Math.sqrt(gamma)
const groupRoot: Factor = (_, group) => Math.sqrt(group)

/**
 * The factors of QK-clip (Kimi K2, arXiv 2507.20534, Algorithm 1) on the query and the key of a head, with γ = τ/S
 * for a largest logit S above the threshold τ, and 1 otherwise. With mha and gqa their product is γ, which leaves a
 * head of S with τ. gqa leaves the shared key alone, which is exact; gqa_group_min is what Megatron-LM does.
 */
const FACTORS: Readonly<Record<Exclude<Attention['rule'], 'mla'>, Readonly<Record<Side, Factor>>>> = {
  mha: { query: ownRoot, key: groupRoot },
  gqa: { query: own, key: untouched },
  gqa_group_min: { query: groupRoot, key: groupRoot },
  gqa_min_key: { query: ownRoot, key: groupRoot },
}

// A factor of 0 would leave rows that no later step can bring back.
const LEAST_FACTOR = 2 ** -126

/** The rows of each parameter that the attentions can scale, by the parameter's index. */
export type Claims = ReadonlyMap<number, readonly Claim[]>

export function claimsByParameter(attentions: readonly Attention[]): Claims {
  const claims = new Map<number, Claim[]>()
  for (const claim of attentions.flatMap(claimsOf)) {
    const others = claims.get(claim.parameter)
    if (others) others.push(claim)
    else claims.set(claim.parameter, [claim])
  }
  return claims
}

/**
 * The factors of a step, one for each row of the parameter as float32 bytes, which the client multiplies into the
 * weights; undefined where all are 1. Nothing keeps them: a replay computes them again from the same logits.
 */
export function rowScale(parameter: Parameter, claims: Claims, logits: MaxLogits): Uint8Array | undefined {
  let scale: Float32Array<ArrayBuffer> | undefined
  for (const claim of claims.get(parameter.index) ?? []) {
    const largest = logits.get(claim.attention.name) ?? []
    if (clippedHeads(claim.attention, largest) === 0) continue
    scale ??= new Float32Array(rowsOf(parameter)).fill(1)
    fill(scale, claim, gammasOf(claim.attention, largest))
  }
  return scale?.some((factor) => factor !== 1) ? new Uint8Array(scale.buffer) : undefined
}

/** A receipt's summary: how many heads were clipped of each attention that has max_logits, and the largest logit. */
export function clipSummary(attentions: readonly Attention[], logits: MaxLogits) {
  const clipped_heads = attentions.flatMap((attention) => {
    const largest = logits.get(attention.name)
    return largest ? [[attention.name, clippedHeads(attention, largest)] as const] : []
  })
  const max_logit = [...logits.values()].flat().reduce((most, logit) => Math.max(most, logit), -Infinity)
  return { clipped_heads: Object.fromEntries(clipped_heads), ...(Number.isFinite(max_logit) && { max_logit }) }
}

/**
 * Checks a step frame's max_logits. A logit up to the threshold, such as -Infinity, clips nothing.
 * Throws MAX_LOGITS_INVALID: an unknown attention, a wrong count, NaN, or more than a float32 holds.
 */
export function checkMaxLogits(
  attentions: readonly Attention[],
  given: Readonly<Record<string, readonly number[]>>,
  step: number,
): MaxLogits {
  const logits = new Map(Object.entries(given))
  if (logits.size === 0) return logits
  const known = new Map(attentions.map((attention) => [attention.name, attention]))
  for (const [name, values] of logits) {
    const reason = whyNot(known.get(name), values)
    if (reason)
      throw new ServiceError('MAX_LOGITS_INVALID', `max_logits of attention ${show(name)}: ${reason}`, { step })
  }
  return logits
}

/** The larger one of each head's logits, of what two members of a run have seen. */
export function largestLogits(one: MaxLogits, other: MaxLogits): MaxLogits {
  const all = new Map(one)
  for (const [name, logits] of other) {
    const before = one.get(name)
    all.set(name, before ? logits.map((logit, head) => Math.max(logit, before[head])) : logits)
  }
  return all
}

/** Whether no logit is larger than that of its head in `bounds`. */
export function isWithin(logits: MaxLogits, bounds: MaxLogits): boolean {
  return [...logits].every(([name, values]) => {
    const most = bounds.get(name)
    return most !== undefined && values.every((logit, head) => logit <= most[head])
  })
}

function whyNot(attention: Attention | undefined, values: readonly number[]): string | undefined {
  if (attention === undefined) return 'the run has no attention of this name'
  const { query_heads } = attention
  if (values.length !== query_heads) return `${values.length} numbers, expected ${query_heads}, one for each query head`
  const head = values.findIndex((value) => !(Math.fround(value) < Infinity))
  return head < 0 ? undefined : `${values[head]} for query head ${head}, expected a float32 number or -Infinity`
}

function clippedHeads({ threshold }: Attention, largest: readonly number[]): number {
  return largest.filter((logit) => logit > threshold).length
}

/** `own`: γ of each query head. `group`: for each key head, the smallest γ of the query heads that share it. */
type Gammas = { readonly own: readonly number[]; readonly group: readonly number[] }

function gammasOf(attention: Attention, largest: readonly number[]): Gammas {
  const { threshold, query_heads, key_value_heads } = attention
  const own = largest.map((logit) => (logit > threshold ? threshold / logit : 1))
  const size = query_heads / key_value_heads
  const group = Array.from({ length: key_value_heads }, (_, head) =>
    own.slice(head * size, (head + 1) * size).reduce((least, gamma) => Math.min(least, gamma)),
  )
  return { own, group }
}

function fill(scale: Float32Array, claim: Claim, { own, group }: Gammas): void {
  const { attention, first_row } = claim
  const side = sideOf(claim)
  const parts = partsOf(attention, side)
  const heads = headsOf(attention, side)
  let row = first_row
  for (let head = 0; head < heads; head++) {
    const least = group[Math.floor((head * group.length) / heads)]
    for (const { rows, factor } of parts) {
      const value = factor(side === 'query' ? own[head] : least, least)
      scale.fill(Math.max(value, LEAST_FACTOR), row, row + rows)
      row += rows
    }
  }
}

function partsOf(attention: Attention, side: Side): readonly Part[] {
  if (attention.rule !== 'mla') return [{ rows: attention.head_dim, factor: FACTORS[attention.rule][side] }]
  const { nope_dim, rope_dim, value_dim } = attention
  const rest = side === 'query' ? { rows: rope_dim, factor: own } : { rows: value_dim, factor: untouched }
  return [{ rows: nope_dim, factor: ownRoot }, rest]
}
