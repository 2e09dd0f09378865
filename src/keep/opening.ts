import type { Demand } from '../device/job.js'
import { ServiceError } from '../errors.js'
import { planStep } from '../optimizer/algorithms/algorithm.js'
import { attentionDifference, parseAttentions } from '../optimizer/attention.js'
import { type Groups, groupOf, stateBearing } from '../optimizer/hyperparameters.js'
import {
  findingDifference,
  PARAMETERS_PER_YIELD,
  type Parameter,
  parsingParameters,
  stateBytes,
} from '../optimizer/parameter.js'
import type { Presets } from '../optimizer/preset.js'
import { parseGroups } from '../run/declaration.js'
import type { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { OpenFrame } from '../wire/frame.js'

// What an `open` asks for, held against the run that is there.

/** Throws RUN_BUSY where a connection has the run and the `open` does not ask to replace it. */
export function checkFree(run: Run, { takeover }: OpenFrame): void {
  if (!run.connected || takeover) return
  throw new ServiceError(
    'RUN_BUSY',
    `run '${run.name}' has a connection (epoch ${run.epoch}), open it with takeover to replace that`,
  )
}

/** Compares what a resuming `open` gives with what the run has; answers the groups to replace, if any were given. */
export async function checkSame(run: Run, frame: OpenFrame, presets: Presets): Promise<Groups | undefined> {
  const existing = run.groups
  const groups = frame.groups && parseGroups(frame.groups, presets)
  if (groups) {
    const difference = groupDifference(existing, groups)
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  if (frame.parameters) {
    const given = await inSlices(parsingParameters(frame.parameters, groups ?? existing))
    const difference = await inSlices(findingDifference(run.parameters, given))
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  if (frame.attentions) {
    const difference = attentionDifference(run.attentions, parseAttentions(frame.attentions, run.parameters))
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  return groups
}

function groupDifference(existing: Groups, given: Groups): string | undefined {
  for (const [name, group] of existing) {
    const other = given.get(name)
    if (!other) return `its group '${name}' is not given`
    const difference = stateBearing(group, other)
    if (difference) return `group '${name}': ${difference}`
  }
  for (const name of given.keys()) if (!existing.has(name)) return `it has no group '${name}'`
  return undefined
}

/** `scales`: bytes of row scales by parameter. `held`: a checkpoint may hold the state of one step beside the next. */
type Asked = { groups: Groups; scales: ReadonlyMap<number, number>; held: boolean }

/** What a run asks of a device: one step of every parameter. Yields from time to time. */
export function* demandsOf(
  parameters: readonly Parameter[],
  { groups, scales, held }: Asked,
): Generator<undefined, Demand[]> {
  // Parameters that are declared alike share the description of their state (parseParameters), and so their plan.
  const alike = new Map<Parameter['state'], Demand>()
  const demands: Demand[] = []
  for (const parameter of parameters) {
    const { index, state, update_bytes } = parameter
    if (index % PARAMETERS_PER_YIELD === PARAMETERS_PER_YIELD - 1) yield
    const demand = alike.get(state) ?? demandOf(parameter, groups, held)
    alike.set(state, demand)
    const scale = scales.get(index)
    demands.push(scale === undefined ? demand : { ...demand, update_bytes: update_bytes + scale })
  }
  return demands
}

function demandOf(parameter: Parameter, groups: Groups, held: boolean): Demand {
  const { gradient_bytes, update_bytes } = parameter
  const plan = planStep(parameter, groupOf(parameter, groups), { step: 1, replay: false })
  const state_bytes = stateBytes(parameter)
  return { plan, gradient_bytes, update_bytes, state_bytes, held_bytes: held ? state_bytes : 0 }
}
