import type { LaidParameter } from '../layout.js'
import { type At, factors, type Plan } from '../plan.js'
import type { Hyperparameters } from '../table.js'

/**
 * torch.optim.RMSprop without centering and L2 decay: v' = b_v·v + b_g·G², B' = c_m·B + c_g·G/(sqrt(v') + eps),
 * data = B', scale = -lr. Without momentum B' is the bare step.
 */
export function planRmsprop(
  parameter: LaidParameter,
  hyperparameters: Hyperparameters<'rmsprop'>,
  { replay }: At,
): Plan {
  const { lr, weight_decay, alpha, eps, momentum } = hyperparameters
  const [b_v, b_g] = replay ? [1, 0] : [alpha, 1 - alpha]
  const [c_m, c_g] = replay ? [1, 0] : [momentum, 1]
  const { kernel_dtypes, elements } = parameter
  return {
    kernel: { kind: 'rmsprop', ...kernel_dtypes },
    tasks: [{ dims: [elements], offset: 0 }],
    scalars: { b_v, b_g, c_m, c_g, eps },
    ...factors(lr, weight_decay),
    rms_factor: 1,
  }
}
