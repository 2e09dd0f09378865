import type { LaidParameter } from '../layout.js'
import { type At, factors, type Plan } from '../plan.js'
import type { Hyperparameters } from '../table.js'

/**
 * torch.optim.SGD with decoupled weight decay: B' = c_m·B + c_g·G, data = n_m·B' + n_g·G, scale = -lr.
 * With nesterov (lr 0.7, momentum 0.9) it is the outer optimizer of DiLoCo (arXiv 2311.08105).
 */
export function planSgd(parameter: LaidParameter, hyperparameters: Hyperparameters<'sgd'>, at: At): Plan {
  const { lr, weight_decay } = hyperparameters
  const { kernel_dtypes, elements } = parameter
  return {
    kernel: { kind: 'sgd', ...kernel_dtypes },
    tasks: [{ dims: [elements], offset: 0 }],
    scalars: momentumScalars(hyperparameters, at),
    ...factors(lr, weight_decay),
    rms_factor: 1,
  }
}

/**
 * As torch does it: the first gradient enters the buffer whole, whatever the dampening. Without momentum the buffer
 * stays as it is, so a schedule that turns momentum on later finds no gradient from before in it.
 */
function momentumScalars({ momentum, dampening, nesterov }: Hyperparameters<'sgd'>, { step, replay }: At) {
  if (momentum === 0) return { c_m: 1, c_g: 0, n_m: 0, n_g: 1 }
  const [c_m, c_g] = replay ? [1, 0] : [momentum, step === 1 ? 1 : 1 - dampening]
  const [n_m, n_g] = nesterov ? [momentum, 1] : [1, 0]
  return { c_m, c_g, n_m, n_g }
}
