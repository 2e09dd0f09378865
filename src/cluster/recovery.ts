import type { Standing } from './commit-log.js'
import type { Whole } from './whole.js'

/** A step that a shard can be at, and its digest then. */
export type ShardPoint = { readonly step: number; readonly digest: string }

/**
 * Where a shard is that its process has opened with a new generation: its last finished step, the digest before that
 * step, and the checkpoints that it can go back to.
 */
export type ShardState = ShardPoint & { readonly previous: string; readonly checkpoints: readonly ShardPoint[] }

/**
 * The step that a whole goes on after, from where its shards are; a head asks it right after `Whole.begin`.
 * - The last committed one, where each shard is there, or one step ahead of it: a shard that has finished a step that
 *   was not committed answers the gradients of that step again, and votes again. With a journal it is always this one,
 *   since a shard votes for a step only once its journal has it.
 * - Else the newest committed step of which every shard has a checkpoint. A checkpoint counts by its digest alone: one
 *   of steps that the whole went back from has another.
 * - Else undefined: there is nothing that all shards can go back to.
 */
export async function stepToGoOnAfter(whole: Whole, states: readonly ShardState[]): Promise<number | undefined> {
  if (states.every((state, shard) => isThere(state, shard, whole.standing))) return whole.step
  const [first, ...others] = states.map(({ checkpoints }) => checkpoints)
  const steps = first
    .map(({ step }) => step)
    .filter((step) => others.every((checkpoints) => checkpoints.some((one) => one.step === step)))
  for (const step of [...new Set(steps)].sort((one, other) => other - one)) {
    const standing = await whole.find(step)
    if (standing && states.every((state, shard) => hasCheckpoint(state, shard, standing))) return step
  }
  return undefined
}

function isThere({ step, digest, previous }: ShardState, shard: number, at: Standing): boolean {
  const expected = at.shards[shard]
  return (step === at.step && digest === expected) || (step === at.step + 1 && previous === expected)
}

function hasCheckpoint({ checkpoints }: ShardState, shard: number, { step, shards }: Standing): boolean {
  return checkpoints.some((one) => one.step === step && one.digest === shards[shard])
}
