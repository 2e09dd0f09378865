import type { Branching, BranchRecord } from './branches.js'
import { FORMAT, type GroupRecord, held, seal, UnreadableError, unseal } from './checkpoint/manifest.js'
import { checkpointIdRule, groupRule } from './checkpoint/manifest-rules.js'
import { count, list, natural, optional, type Rule, type Rules, record, text } from './rules.js'

/**
 * What a run remembers beside its checkpoints: how often it was opened, the branch of its history on which it goes on,
 * and groups that a connection gave anew.
 */
export type Identity = Branching & { run: string; epoch: number; replacement?: Replacement | undefined }

/**
 * Groups that were given when `step` was the last finished one: for the next step, and those for the steps after
 * that.
 */
export type Replacement = { step: number; groups: GroupRecord[]; later?: GroupRecord[] }

type File = Identity & { format: number }

const rules: Rules<Identity> = {
  run: text(),
  epoch: count,
  branch: count,
  branches: list(record<BranchRecord>({ branch: natural, parent: count, checkpoint: checkpointIdRule })),
  replacement: optional(
    record<Replacement>({ step: count, groups: list(groupRule), later: optional(list(groupRule)) }),
  ),
}

export const identityRule = inOrder(record<Identity>(rules))
const fileRule = inOrder(record<File>({ format: count, ...rules }))

function inOrder<T extends Identity>({ problem }: Rule<T>): Rule<T> {
  return { problem: (value, path) => problem(value, path) ?? disorder(value as T) }
}

/** A branch begins behind an older one, and none is younger than that on which the run goes on. */
function disorder({ branch: present, branches }: Identity): string | undefined {
  for (const [i, { branch, parent }] of branches.entries()) {
    const [least, most] = [Math.max(parent, branches[i - 1]?.branch ?? 0) + 1, present]
    if (branch < least || branch > most) return `branches[${i}].branch is ${branch}, expected ${least} to ${most}`
  }
  return undefined
}

/** The identity of a new run. */
export function newIdentity(run: string): Identity {
  return { run, epoch: 0, branch: 0, branches: [] }
}

/** The text of a run's `run.json`. */
export function sealIdentity({ run, epoch, branch, branches, replacement }: Identity): string {
  return seal({ format: FORMAT, run, epoch, branch, branches, replacement })
}

/** Reads it, for the run whose folder it lies in. Throws UnreadableError, also where it is of another run. */
export function openIdentity(content: string, file: string, name: string): Identity {
  const { format: _, ...identity } = held(fileRule, unseal(content, file), file)
  // Two folders, or two ways to one, must not become two runs: each would take the other's files for its own.
  if (identity.run === name) return identity
  throw new UnreadableError(`${file}: run is "${identity.run}", expected '${name}' as its folder is called`)
}
