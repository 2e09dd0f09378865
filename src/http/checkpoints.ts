import { once } from 'node:events'
import { ServiceError } from '../errors.js'
import { checkTag } from '../run/keeper.js'
import type { Runs } from '../run/runs.js'
import type { CheckpointEntry, RunFolder } from '../store/run-folder.js'

/** How long a checkpoint waits for the step in progress to end. */
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

/** Takes a checkpoint between two steps: of a step in progress the end is waited for. Throws as `Keeper.begin` and `written` do. */
export async function takeCheckpoint(runs: Runs, name: string, tag?: string): Promise<CheckpointEntry> {
  const run = runs.get(name)
  const keeper = runs.keeper(name)
  checkTag(tag)
  const signal = AbortSignal.timeout(BOUNDARY_MS)
  for (;;) {
    try {
      return await keeper.take(tag)
    } catch (error) {
      const begun = error instanceof ServiceError && error.code === 'STEP_INCOMPLETE'
      if (!begun || signal.aborted) throw error
      await once(run, 'receipt', { signal }).catch(() => undefined)
    }
  }
}
