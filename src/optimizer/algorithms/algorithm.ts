import type { Group } from '../hyperparameters.js'
import type { LaidParameter } from '../layout.js'
import type { At, Plan } from '../plan.js'
import { planAdamw } from './adamw.js'
import { planMuon } from './muon.js'
import { planRmsprop } from './rmsprop.js'
import { planSgd } from './sgd.js'

/** Plans one step of `parameter` with the hyperparameters of its group. Pure: the same arguments give the same plan. */
export function planStep(parameter: LaidParameter, group: Group, at: At): Plan {
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

function noPlan(group: never): never {
  throw new Error(`no plan for ${JSON.stringify(group)}`)
}
