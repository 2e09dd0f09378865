import { ServiceError } from '../../errors.js'
import { effective, type Group, type Groups } from '../../optimizer/hyperparameters.js'
import { clipSummary } from '../../optimizer/qk-clip.js'
import { nextDigest } from '../digest.js'
import type { Receipt } from '../history.js'
import type { Member } from '../members/member.js'
import type { Shard } from '../shard.js'
import type { Step } from './step.js'

// The end of a step: whether it is complete, and the receipt that says what it came to.

const NAMES_IN_MESSAGE = 10

/**
 * Throws STEP_INCOMPLETE where a parameter that a member has elements of was neither skipped nor `isThere`, which is to
 * say applied, and STEP_CONFLICT where one was skipped and applied.
 */
export function checkComplete(
  step: Step,
  shard: Shard,
  { member, skipped, isThere }: { member: Member; skipped: ReadonlySet<number>; isThere: (index: number) => boolean },
): void {
  const { number, expected: expected_step } = step
  for (const index of skipped) {
    const { parameter } = shard.place(index)
    if (!step.hasApplied(index) || !member.has(parameter)) continue
    const message = `parameter '${parameter.name}' was applied in step ${number} and cannot be skipped in it any more`
    throw new ServiceError('STEP_CONFLICT', message, { step: number, expected_step, parameter: index })
  }
  const missing = shard.parameters.filter((parameter) => {
    const { index } = parameter
    return !isThere(index) && !skipped.has(index) && member.has(parameter)
  })
  if (missing.length === 0) return
  const names = missing.slice(0, NAMES_IN_MESSAGE).map(({ name }) => `'${name}'`)
  const more = missing.length > names.length ? ` and ${missing.length - names.length} more` : ''
  throw new ServiceError(
    'STEP_INCOMPLETE',
    `step ${number} has neither a gradient nor a place in skipped for ${names.join(', ')}${more}`,
    { step: number },
  )
}

/** The receipt of a step that is complete; `digest` is the one before it, `durable` whether a journal has the step. */
export function conclude(step: Step, shard: Shard, { digest, durable }: { digest: string; durable: boolean }): Receipt {
  const { settings, contributors } = step
  const { groups, frame } = settings
  const applied = shard.applied(step)
  return {
    type: 'receipt',
    step: step.number,
    replayed: false,
    applied: applied.length,
    skipped: shard.parameters.length - applied.length,
    gradient_norm: Math.sqrt(applied.reduce((sum, place) => sum + place.gradientSquare, 0)),
    groups: effectiveGroups(groups),
    ...clipSummary(shard.attentions, frame.max_logits),
    digest: nextDigest(digest, step.number, shard.records(step)),
    durable,
    seconds: { ...step.clock.seconds },
    ...(contributors.length > 0 && { contributors }),
  }
}

const known = new WeakMap<Groups, Readonly<Record<string, Effective>>>()
const knownOfGroup = new WeakMap<Group, Effective>()

type Effective = ReturnType<typeof effective>

/**
 * Every hyperparameter that is in force, by group. Groups that did not change since another step are the same objects
 * again: a receipt is kept for long, and most of its bytes would repeat them.
 */
export function effectiveGroups(groups: Groups): Readonly<Record<string, Effective>> {
  const before = known.get(groups)
  if (before) return before
  const all = Object.fromEntries([...groups].map(([name, group]) => [name, effectiveGroup(group)]))
  known.set(groups, all)
  return all
}

function effectiveGroup(group: Group): Effective {
  const before = knownOfGroup.get(group)
  if (before) return before
  const values = effective(group)
  knownOfGroup.set(group, values)
  return values
}
