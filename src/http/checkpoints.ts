import { once } from 'node:events'
import { ServiceError } from '../errors.js'
import { checkTag } from '../run/keeper.js'
import type { Run } from '../run/run.js'
import type { Runs } from '../run/runs.js'
import type { CheckpointEntry, RunFolder } from '../store/run-folder.js'

/** How long the end of the step in progress is waited for. */
const BOUNDARY_MS = 30_000

/** The checkpoint with an id or a tag. Throws NOT_FOUND. */
export function findCheckpoint(
  folder: RunFolder,
  { run, checkpoint }: { run: string; checkpoint: string },
): CheckpointEntry {
  const entry = folder.find(checkpoint)
  if (entry) return entry
  throw new ServiceError('NOT_FOUND', `run '${run}' has no checkpoint '${checkpoint}'`)
}

/** Takes a checkpoint between two steps. Throws as `Keeper.begin` and `written` do. */
export async function takeCheckpoint(runs: Runs, name: string, tag?: string): Promise<CheckpointEntry> {
  const run = runs.get(name)
  const keeper = runs.keeper(name)
  checkTag(tag)
  return betweenSteps(runs, run, () => keeper.take(tag))
}

/** Does what throws STEP_INCOMPLETE while a step is in progress: its end is waited for, but not for ever. */
export async function betweenSteps<T>(runs: Runs, run: Run, work: () => Promise<T>): Promise<T> {
  const signal = AbortSignal.any([AbortSignal.timeout(BOUNDARY_MS), runs.closing])
  for (;;) {
    try {
      return await work()
    } catch (error) {
      const begun = error instanceof ServiceError && error.code === 'STEP_INCOMPLETE'
      if (!begun || signal.aborted) throw error
      await once(run, 'receipt', { signal }).catch(() => undefined)
    }
  }
}
