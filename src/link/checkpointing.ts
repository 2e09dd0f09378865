import { ServiceError } from '../errors.js'
import { checkTag } from '../keep/keeper.js'
import type { Runs } from '../keep/runs.js'
import type { Run } from '../run/run.js'

/**
 * Begins a checkpoint of the last finished step; `busy`: gradients of the connection are computed, or their updates
 * sent. Resolves once the next step may begin, with what resolves when the checkpoint is on the disk. Throws
 * FRAME_UNEXPECTED in the middle of a step.
 */
export function beginCheckpoint(
  runs: Runs,
  run: Run,
  { tag, busy }: { tag: string | undefined; busy: boolean },
): ReturnType<ReturnType<Runs['keeper']>['begin']> {
  if (busy || run.begun) {
    const message = `a frame 'checkpoint' after gradients of step ${run.step + 1}, expected between two steps`
    throw new ServiceError('FRAME_UNEXPECTED', message)
  }
  return runs.keeper(run.name).begin(checkTag(tag))
}
