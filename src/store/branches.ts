import { join } from 'node:path'
import { byAge } from './checkpoint/checkpoint-id.js'

/**
 * A branch of a run's history, which begins behind a checkpoint of the branch `parent`. Branch 0 begins with the run
 * and has no record.
 */
export type BranchRecord = { readonly branch: number; readonly parent: number; readonly checkpoint: string }

/** `branch` is where the run goes on; of every other branch only checkpoints are left. */
export type Branching = { readonly branch: number; readonly branches: readonly BranchRecord[] }

/** Where the checkpoints and the journal of a branch lie in the folder of its run. */
export function branchFolder(run: string, branch: number): string {
  return branch === 0 ? run : join(run, 'branches', String(branch))
}

/** Tells the checkpoints of the history that the run has now from those of branches that it has left. */
export class HistoryPath {
  /** The last checkpoint of each branch on the path; undefined where all of the branch is on it. */
  readonly #until = new Map<number, string | undefined>()

  constructor({ branch, branches }: Branching) {
    const records = new Map(branches.map((record) => [record.branch, record]))
    this.#until.set(branch, undefined)
    for (let at = records.get(branch); at; at = records.get(at.parent)) this.#until.set(at.parent, at.checkpoint)
  }

  has({ branch, checkpoint }: { branch: number; checkpoint: string }): boolean {
    if (!this.#until.has(branch)) return false
    const until = this.#until.get(branch)
    return until === undefined || byAge(checkpoint, until) <= 0
  }
}

/**
 * The records that still tell something once only the branches of `left`, and the present one, have checkpoints: a
 * branch that begins behind an empty one begins where that does.
 */
export function prune({ branch, branches }: Branching, left: ReadonlySet<number>): BranchRecord[] {
  const records = new Map(branches.map((record) => [record.branch, record]))
  const isEmpty = (number: number) => number !== branch && !left.has(number)
  const kept: BranchRecord[] = []
  for (const record of branches) {
    if (isEmpty(record.branch)) continue
    let from: BranchRecord | undefined = record
    for (let parent = records.get(from.parent); parent && isEmpty(parent.branch); parent = records.get(parent.parent))
      from = parent
    kept.push({ branch: record.branch, parent: from.parent, checkpoint: from.checkpoint })
  }
  return kept
}
