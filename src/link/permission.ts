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

/** Throws PARAMETER_INVALID for what only a process with peers can open: several shards, and a shard itself. */
export function refuseShards({ run, shards = 1, shard }: OpenFrame): void {
  const remedy = 'this service has no peers (--peers), and spreads no run over several processes'
  if (shards > 1) throw new ServiceError('PARAMETER_INVALID', `run '${run}' asks for ${shards} shards: ${remedy}`)
  if (shard !== undefined || run.includes('~'))
    throw new ServiceError('PARAMETER_INVALID', `'${run}' is a shard of a run: ${remedy}`)
}
