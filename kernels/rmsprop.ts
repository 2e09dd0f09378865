import type { Graph } from './graph/graph.js'
import type { KernelValues } from './kernel.js'
import { SMALLEST_NORMAL } from './orthogonalize/newton-schulz.js'

/**
 * torch.optim.RMSprop without centering: v' = b_v·v + b_g·G², B' = c_m·B + c_g·G/(√v' + eps), data = B'.
 * v is `square_avg`, B `momentum_buffer`; without momentum c_m is 0, a replay has b = c = (1, 0).
 * The floor under eps keeps a zero gradient with eps 0 from 0/0.
 */
export function rmsprop(graph: Graph, gradient: string): KernelValues {
  const v = graph.add(graph.mul('square_avg', 'b_v'), graph.mul(graph.mul(gradient, gradient), 'b_g'))
  const eps = graph.node('Max', ['eps', graph.constant(SMALLEST_NORMAL)])
  const step = graph.div(gradient, graph.add(graph.node('Sqrt', [v]), eps))
  const buffer = graph.add(graph.mul('momentum_buffer', 'c_m'), graph.mul(step, 'c_g'))
  // Each is halved, so that the sum of two finite numbers stays finite.
  const half = graph.constant(0.5)
  const checked = graph.add(graph.mul(v, half), graph.mul(graph.node('Abs', [buffer]), half))
  return { next: [v, buffer], data: buffer, checked }
}
