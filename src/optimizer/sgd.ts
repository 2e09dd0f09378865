import type { Laid } from './parameter.js'
import { type At, factors, type Plan } from './plan.js'
import type { Hyperparameters } from './table.js'

/**
 * torch.optim.SGD with decoupled weight decay: B' = c_m·B + c_g·G, data = n_m·B' + n_g·G, scale = -lr.
 * With nesterov (lr 0.7, momentum 0.9) it is the outer optimizer of DiLoCo (arXiv 2311.08105).
 */
export function planSgd(parameter: Laid, hyperparameters: Hyperparameters<'sgd'>, at: At): Plan {
  const { lr, weight_decay, momentum, nesterov } = hyperparameters
  const [c_m, c_g] = at.replay ? [1, 0] : [momentum, gradientShare(hyperparameters, at.step)]
  const [n_m, n_g] = nesterov ? [momentum, 1] : [1, 0]
  const { gradient_dtype, update_dtype, elements } = parameter
  return {
    kernel: { kind: 'sgd', gradient_dtype, update_dtype },
    tasks: [{ dims: [elements], offset: 0 }],
    scalars: { c_m, c_g, n_m, n_g },
    ...factors(lr, weight_decay),
    rms_factor: 1,
  }
}

/** torch starts the buffer as the bare first gradient, and reads dampening only where there is momentum. */
function gradientShare({ momentum, dampening }: Hyperparameters<'sgd'>, step: number): number {
  return step === 1 || momentum === 0 ? 1 : 1 - dampening
}
