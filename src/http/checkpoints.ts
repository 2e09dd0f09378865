import { ServiceError } from '../errors.js'
import type { Runs } from '../keep/runs.js'
import type { Run } from '../run/run.js'
import type { CheckpointEntry } from '../store/checkpoint/checkpoint-list.js'
import type { RunStore } from '../store/run-store.js'

/** The checkpoint of a run by its id or a tag. Throws NOT_FOUND. */
export function findCheckpoint(
  store: RunStore,
  { run, checkpoint }: { run: string; checkpoint: string },
): CheckpointEntry {
  const entry = store.find(checkpoint)
  if (entry) return entry
  throw new ServiceError('NOT_FOUND', `run '${run}' has no checkpoint '${checkpoint}'`)
}

/** Does `work` between two steps: where it throws STEP_INCOMPLETE, again after the step in progress; see Boundary. */
export function betweenSteps<T>(runs: Runs, run: Run, work: () => Promise<T>): Promise<T> {
  return run.boundary.reach(work, runs.closing)
}
