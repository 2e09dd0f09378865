import type { LaidParameter } from '../layout.js'
import { type At, factors, type Plan } from '../plan.js'
import type { Hyperparameters } from '../table.js'

/**
 * AdamW (arXiv 1711.05101; torch.optim.AdamW): m' = a_m·m + a_g·G, v' = b_v·v + b_g·G², data = (m'/bias1) /
 * (sqrt(v')/bias2_sqrt + eps), scale = -lr. The bias corrections take the parameter's own step. Without weight decay
 * this is torch.optim.Adam. amsgrad divides by the largest v' so far, which a replay leaves as it is: max(max(v, v'),
 * v') = max(v, v').
 */
export function planAdamw(
  parameter: LaidParameter,
  hyperparameters: Hyperparameters<'adamw'>,
  { step, replay }: At,
): Plan {
  const { lr, weight_decay, betas, eps, amsgrad } = hyperparameters
  const [beta1, beta2] = betas
  const [a_m, a_g] = replay ? [1, 0] : [beta1, 1 - beta1]
  const [b_v, b_g] = replay ? [1, 0] : [beta2, 1 - beta2]
  const bias = { bias1: 1 - beta1 ** step, bias2_sqrt: Math.sqrt(1 - beta2 ** step) }
  const { kernel_dtypes, elements } = parameter
  return {
    kernel: { kind: 'adamw', ...(amsgrad ? { amsgrad } : {}), ...kernel_dtypes },
    tasks: [{ dims: [elements], offset: 0 }],
    scalars: { a_m, a_g, b_v, b_g, ...bias, eps },
    ...factors(lr, weight_decay),
    rms_factor: 1,
  }
}
