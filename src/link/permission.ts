import type { Principal } from '../access/principal.js'
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
