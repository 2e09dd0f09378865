import { planStep } from '../optimizer/algorithms/algorithm.js'
import type { Group } from '../optimizer/hyperparameters.js'
import type { Parameter } from '../optimizer/parameter.js'
import type { At, Plan } from '../optimizer/plan.js'
import { withMeanGradient } from './step/mean-demands.js'

// A plan of many tasks takes memory, and few parameters of a run have one alike.
const TASKS_KEPT = 64

/** A step, and whether its gradient is a mean of replicas: that is float32, whatever they send. */
type Planned = At & { readonly isMean?: boolean }

/**
 * Plans of steps, each made once for all parameters that are declared alike: a lane that is sent many jobs together
 * then gets their plan once.
 */
export class Plans {
  /** The newest plan of each group and form: parameters that are declared alike have the same shape object. */
  readonly #newest = new WeakMap<Group, Map<readonly number[], { at: Planned; plan: Plan }>>()

  of(parameter: Parameter, group: Group, at: Planned): Plan {
    const forms = this.#newest.get(group) ?? new Map()
    const known = forms.get(parameter.shape)
    if (known && known.at.step === at.step && known.at.replay === at.replay && known.at.isMean === at.isMean)
      return known.plan
    const plan = planStep(at.isMean ? withMeanGradient(parameter) : parameter, group, at)
    if (plan.tasks.length <= TASKS_KEPT) this.#newest.set(group, forms.set(parameter.shape, { at, plan }))
    return plan
  }
}
