import assert from 'node:assert'
import type { Principal } from '../access/principal.js'
import { ServiceError } from '../errors.js'
import type { Runs } from '../keep/runs.js'
import type { OpenFrame } from '../wire/frame.js'

/**
 * Throws FORBIDDEN where a principal may not open this, and RUN_NOT_FOUND for a run of others, as for one that does not
 * exist: what is answered depends on the name alone, not on whether there is such a run.
 */
export function checkOpening(principal: Principal, runs: Runs, { run, mode, checkpoint, from }: OpenFrame): void {
  if (from || checkpoint !== undefined)
    principal.demand('checkpoint', `an 'open' with '${from ? 'from' : 'checkpoint'}'`)
  const creates = mode !== 'resume' && checkpoint === undefined
  if (creates) principal.demandName(run)
  for (const name of [run, ...(from ? [from.run] : [])]) if (!principal.sees(name)) throw runs.absent(name)
}

/** Why a stream, which has opened a run or none, cannot go on with the grants that its key has now. */
export function accessLost(principal: Principal, run: string | undefined): ServiceError | undefined {
  try {
    principal.demand('step', 'the stream')
    if (run !== undefined) principal.demandName(run)
    return undefined
  } catch (error) {
    assert(error instanceof ServiceError)
    return new ServiceError(error.code, error.message, { close: 1008 })
  }
}
