import type { Graph } from './graph/graph.js'
import type { KernelValues } from './kernel.js'
import { SMALLEST_NORMAL } from './orthogonalize/newton-schulz.js'

/**
 * AdamW (arXiv 1711.05101) without its decoupled decay, which is the client's part:
 * m' = a_m·m + a_g·G, v' = b_v·v + b_g·G², data = (m'/bias1) / (√v'/bias2_sqrt + eps)
 * with bias1 = 1-β1ᵗ and bias2_sqrt = √(1-β2ᵗ). A replay has a = b = (1, 0).
 * With `amsgrad` (Reddi et al. 2018, as torch has it) the root is of the largest v' so far, `max_exp_avg_sq`.
 *
 * Both fractions are expanded by bias2_sqrt, so the bias correction costs scalar operations only. The floor under
 * eps keeps a zero gradient with eps 0 from 0/0 and is far below one ulp of every other denominator.
 */
export function adamw(graph: Graph, gradient: string, { amsgrad }: { amsgrad: boolean }): KernelValues {
  const m = graph.add(graph.mul('exp_avg', 'a_m'), graph.mul(gradient, 'a_g'))
  const v = graph.add(graph.mul('exp_avg_sq', 'b_v'), graph.mul(graph.mul(gradient, gradient), 'b_g'))
  const largest = amsgrad ? graph.node('Max', ['max_exp_avg_sq', v]) : v
  const eps = graph.node('Max', [graph.mul('eps', 'bias2_sqrt'), graph.constant(SMALLEST_NORMAL)])
  const numerator = graph.mul(m, graph.div('bias2_sqrt', 'bias1'))
  const data = graph.div(numerator, graph.add(graph.node('Sqrt', [largest]), eps))
  // G² overflows before G does, so a finite v' means a finite m'.
  return { next: amsgrad ? [m, v, largest] : [m, v], data, checked: v }
}
