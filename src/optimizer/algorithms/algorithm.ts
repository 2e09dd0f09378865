import type { Group } from '../hyperparameters.js'
import type { Laid } from '../parameter.js'
import type { At, Plan } from '../plan.js'
import { HYPERPARAMETERS, type Rule } from '../table.js'
import { planAdamw } from './adamw.js'
import { planMuon } from './muon.js'
import { planRmsprop } from './rmsprop.js'
import { planSgd } from './sgd.js'

/** How to compute one step of `parameter` with the hyperparameters of its group. Pure: same arguments, same plan. */
export function planStep(parameter: Laid, group: Group, at: At): Plan {
  switch (group.algorithm) {
    case 'muon':
    case 'muonclip':
      return planMuon(parameter, group.hyperparameters, at)
    case 'adamw':
    case 'adam':
      return planAdamw(parameter, group.hyperparameters, at)
    case 'rmsprop':
      return planRmsprop(parameter, group.hyperparameters, at)
    case 'sgd':
      return planSgd(parameter, group.hyperparameters, at)
    default:
      return noPlan(group)
  }
}

type Description = { readonly default: unknown; readonly description: string }

/** What `GET /v1/capabilities` says: algorithm -> hyperparameter -> its default, meaning and range. */
export const ALGORITHMS: Readonly<Record<string, Readonly<Record<string, Description>>>> = Object.fromEntries(
  Object.entries(HYPERPARAMETERS).map(([algorithm, table]) => [algorithm, describeTable(table)]),
)

function describeTable(table: Readonly<Record<string, Rule<unknown>>>): Readonly<Record<string, Description>> {
  const rows = Object.entries(table).map(([key, rule]) => {
    const when = rule.sticky ? '' : ' Fixed at open.'
    return [key, { default: rule.default, description: `${rule.description}${when} Expected: ${rule.expected}.` }]
  })
  return Object.fromEntries(rows)
}

function noPlan(group: never): never {
  throw new Error(`no plan for ${JSON.stringify(group)}`)
}
