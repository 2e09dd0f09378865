import { isDeepStrictEqual } from 'node:util'
import { ServiceError } from '../errors.js'
import { nextDigest, type StepRecord } from '../run/digest.js'
import type { ReceiptFrame, StepSeconds } from '../wire/frame.js'
import type { Standing } from './commit-log.js'

/** What a shard tells of a parameter; `gradient_square` is the square of its gradient's norm, 0 where skipped. */
export type VotedRecord = StepRecord & { readonly gradient_square: number }

/**
 * What a shard tells the head of a step that it has finished: a record for each of its parameters, in order, its own
 * receipt, whose digest is that of the shard, and the generation of the assignment under which it was opened.
 */
export type Vote = {
  readonly generation: number
  readonly shard: number
  readonly step: number
  readonly records: readonly VotedRecord[]
  readonly receipt: ReceiptFrame
}

/** What is the same for all shards, though each tells it of itself. */
const SHARED = ['groups', 'contributors'] as const

/** Of the whole: which shard has which parameters, by index, and the names of its attentions, in order. */
export type Parts = { readonly parameters: readonly (readonly number[])[]; readonly attentions: readonly string[] }

/**
 * Throws where a vote is not of the step after `standing`, or does not lead there from the digest that its shard has
 * in `standing`: PARAMETER_INVALID for one that no shard of this whole can give, STEP_CONFLICT for a shard that is
 * elsewhere than the whole.
 */
export function checkVote({ shard, step, records, receipt }: Vote, standing: Standing, { parameters }: Parts): void {
  const own = parameters[shard] as readonly number[] | undefined
  if (own === undefined)
    throw new ServiceError(
      'PARAMETER_INVALID',
      `vote of shard ${shard}, there are shards 0 to ${parameters.length - 1}`,
    )
  if (records.length !== own.length) {
    const message = `the vote of shard ${shard} has ${records.length} records, expected ${own.length}, one for each parameter`
    throw new ServiceError('PARAMETER_INVALID', message, { step })
  }
  const digest = nextDigest(standing.shards[shard], step, records)
  if (receipt.digest === digest) return
  const message = `shard ${shard} has digest ${receipt.digest} after step ${step}, its records lead from the last commit to ${digest}`
  throw new ServiceError('STEP_CONFLICT', `${message}: the shard is not where the run is`, { step })
}

/** Throws STEP_CONFLICT where two shards have finished a step with other values of it, or of other replicas. */
export function checkAgreement(vote: Vote, other: Vote): void {
  for (const key of SHARED) checkEqual(key, [vote, other], ({ receipt }) => receipt[key])
  const [scale, its] = [vote, other].map(gradientScale)
  // A shard that has skipped all of its parameters knows of none.
  if (scale !== undefined && its !== undefined) checkEqual('gradient_scale', [vote, other], gradientScale)
}

function checkEqual(name: string, votes: readonly [Vote, Vote], partOf: (vote: Vote) => unknown): void {
  const [one, two] = votes.map(partOf)
  if (isDeepStrictEqual(one, two)) return
  const [first, second] = votes.map((vote) => `${JSON.stringify(partOf(vote))} in shard ${vote.shard}`)
  const [{ step }] = votes
  const message = `step ${step} has ${name} ${first}, ${second}: shards have computed other steps`
  throw new ServiceError('STEP_CONFLICT', message, { step })
}

function gradientScale({ records }: Vote): number | undefined {
  return records.find(({ applied }) => applied)?.applied?.gradient_scale
}

/**
 * Where the whole is after a step that all shards have voted for, in their order. Digest and gradient_norm are those
 * of one process that has all parameters, bit for bit, since both are made in the order of the parameters. The seconds
 * of a phase are summed, as they are over the lanes of one process.
 */
export function tally(votes: readonly Vote[], before: Standing, parts: Parts & { isDurable: boolean }): Standing {
  const [{ step, receipt: first }] = votes
  const records = inOrder(votes, parts.parameters)
  const digest = nextDigest(before.digest, step, records)
  const receipts = votes.map(({ receipt }) => receipt)
  const total = (key: 'applied' | 'skipped') => receipts.reduce((sum, receipt) => sum + receipt[key], 0)
  const receipt: ReceiptFrame = {
    ...{ type: 'receipt', step, replayed: false, applied: total('applied'), skipped: total('skipped') },
    gradient_norm: gradientNorm(records),
    groups: first.groups,
    ...clipped(receipts, parts.attentions),
    digest,
    durable: parts.isDurable && receipts.every(({ durable }) => durable),
    seconds: spent(receipts),
    ...(first.contributors && { contributors: first.contributors }),
  }
  return { step, digest, shards: receipts.map((one) => one.digest), receipt }
}

/** The records of all parameters, in the order of their indices. */
function inOrder(votes: readonly Vote[], parameters: Parts['parameters']): VotedRecord[] {
  const records: VotedRecord[] = []
  for (const { shard, records: own } of votes)
    for (const [i, index] of parameters[shard].entries()) records[index] = own[i]
  return records
}

/** Sums as one process does (run/step/conclusion.ts): a sum of sums would have other last bits. */
function gradientNorm(records: readonly VotedRecord[]): number {
  const applied = records.filter((record) => record.applied)
  return Math.sqrt(applied.reduce((sum, { gradient_square }) => sum + gradient_square, 0))
}

function clipped(receipts: readonly ReceiptFrame[], attentions: readonly string[]) {
  const heads = new Map(receipts.flatMap(({ clipped_heads }) => Object.entries(clipped_heads)))
  const clipped_heads = attentions.flatMap((name) => {
    const count = heads.get(name)
    return count === undefined ? [] : [[name, count] as const]
  })
  const logits = receipts.flatMap(({ max_logit }) => (max_logit === undefined ? [] : [max_logit]))
  return {
    clipped_heads: Object.fromEntries(clipped_heads),
    ...(logits.length > 0 && { max_logit: Math.max(...logits) }),
  }
}

function spent(receipts: readonly ReceiptFrame[]): StepSeconds {
  const sum = (phase: keyof StepSeconds) => receipts.reduce((total, { seconds }) => total + seconds[phase], 0)
  return { receive: sum('receive'), queue: sum('queue'), compute: sum('compute'), send: sum('send') }
}
