import type { Demand } from '../device/job.js'
import { ServiceError } from '../errors.js'
import { planStep } from '../optimizer/algorithms/algorithm.js'
import { attentionDifference, parseAttentions } from '../optimizer/attention.js'
import { type Groups, groupOf, stateBearing } from '../optimizer/hyperparameters.js'
import { firstDifference, type Parameter, parseParameters, stateBytes } from '../optimizer/parameter.js'
import type { Presets } from '../optimizer/preset.js'
import { parseGroups } from '../run/declaration.js'
import type { Run } from '../run/run.js'
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
export function checkSame(run: Run, frame: OpenFrame, presets: Presets): Groups | undefined {
  const existing = run.groups
  const groups = frame.groups && parseGroups(frame.groups, presets)
  if (groups) {
    const difference = groupDifference(existing, groups)
    if (difference) throw new ServiceError('RUN_MISMATCH', `run '${run.name}': ${difference}`)
  }
  if (frame.parameters) {
    const difference = firstDifference(run.parameters, parseParameters(frame.parameters, groups ?? existing))
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

/** What a run asks of a device: one step of every parameter. */
export function demandsOf(parameters: readonly Parameter[], groups: Groups): Demand[] {
  return parameters.map((parameter) => ({
    plan: planStep(parameter, groupOf(parameter, groups), { step: 1, replay: false }),
    gradient_bytes: parameter.gradient_bytes,
    update_bytes: parameter.update_bytes,
    state_bytes: stateBytes(parameter),
  }))
}
