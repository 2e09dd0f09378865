import { ServiceError } from '../errors.js'
import type { CheckpointEntry, RunFolder } from '../store/run-folder.js'

/** The checkpoint with an id or a tag. Throws NOT_FOUND. */
export function findCheckpoint(
  folder: RunFolder,
  { run, checkpoint }: { run: string; checkpoint: string },
): CheckpointEntry {
  const entry = folder.find(checkpoint)
  if (entry) return entry
  throw new ServiceError('NOT_FOUND', `run '${run}' has no checkpoint '${checkpoint}'`)
}
