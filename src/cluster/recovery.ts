import type { Standing } from './commit-log.js'
import type { Whole } from './whole.js'

/** A step that a shard can be at, and its digest then. */
export type ShardPoint = { readonly step: number; readonly digest: string }

/**
 * Where a shard is that its process has opened with a new generation: its last finished step, the digest before that
 * step, and the checkpoints that it can go back to.
 */
export type ShardState = ShardPoint & { readonly previous: string; readonly checkpoints: readonly ShardPoint[] }

/** The step that a whole goes on after, and the shards that go back to their checkpoint of it first. */
export type Recovery = { readonly step: number; readonly back: readonly number[] }

/**
 * Where a whole goes on, from where its shards are; a head asks it right after `Whole.begin`.
 * - After the last committed step, where each shard is there, or one step ahead: a shard that has finished a step which
 *   was not committed answers the gradients of that step again, and votes again. With a journal it always comes to
 *   this, since a shard votes for a step only once its journal has it. A shard that is ahead goes back if it can: where
 *   the whole has gone back before, the step that the shard has may be one that nobody sends again.
 * - Else after the newest committed step of which every shard has a checkpoint. A checkpoint counts by its digest
 *   alone: one of steps that the whole went back from has another.
 * - Else undefined: there is nothing that all shards can go back to.
 */
export async function recoveryOf(whole: Whole, states: readonly ShardState[]): Promise<Recovery | undefined> {
  const { standing } = whole
  if (states.every((state, shard) => isThere(state, shard, standing))) {
    const back = elsewhere(states, standing).filter((shard) => hasCheckpoint(states[shard], shard, standing))
    return { step: whole.step, back }
  }
  for (const step of commonSteps(states)) {
    const earlier = await whole.find(step)
    if (earlier && states.every((state, shard) => hasCheckpoint(state, shard, earlier)))
      return { step, back: elsewhere(states, earlier) }
  }
  return undefined
}

/** The steps of which every shard has a checkpoint, the newest first. */
function commonSteps(states: readonly ShardState[]): number[] {
  const [first, ...others] = states.map(({ checkpoints }) => new Set(checkpoints.map(({ step }) => step)))
  return [...first].filter((step) => others.every((steps) => steps.has(step))).sort((one, other) => other - one)
}

/** The shards that are not where the whole is. */
function elsewhere(states: readonly ShardState[], { shards }: Standing): number[] {
  return [...states.keys()].filter((shard) => states[shard].digest !== shards[shard])
}

function isThere({ step, digest, previous }: ShardState, shard: number, at: Standing): boolean {
  const expected = at.shards[shard]
  return (step === at.step && digest === expected) || (step === at.step + 1 && previous === expected)
}

function hasCheckpoint({ checkpoints }: ShardState, shard: number, { step, shards }: Standing): boolean {
  return checkpoints.some((one) => one.step === step && one.digest === shards[shard])
}
