import type { Graph } from './graph/graph.js'
import type { KernelValues, MuonOptions } from './kernel.js'
import { momentum } from './momentum.js'
import { normuon } from './normuon.js'
import { halfIterations, plainIterations } from './orthogonalize/exact-scalars.js'
import { newtonSchulz, normalize } from './orthogonalize/newton-schulz.js'

/**
 * Muon: the momentum's direction, orthogonalized, divided by NorMuon's statistic where there is one, times
 * `output_scale`. Formulas: momentum.ts, newton-schulz.ts, normuon.ts.
 */
export function muon(
  graph: Graph,
  gradient: string,
  { coefficients, tall, momentum_dtype, second_momentum, half }: MuonOptions & { half: boolean },
): KernelValues {
  const { buffer, direction } = momentum(graph, gradient, momentum_dtype)
  const normalized = normalize(graph, direction, 'eps')
  const orthogonalized = half
    ? halfNewtonSchulz(graph, normalized, { coefficients, tall })
    : newtonSchulz(graph, normalized, { iterations: plainIterations(coefficients), tall })
  const even = second_momentum && normuon(graph, orthogonalized, second_momentum)
  const data = graph.mul(even ? even.data : orthogonalized, 'output_scale')
  // A buffer that is not finite makes the direction not finite, whatever n_m is (0·∞ is NaN): one check covers both.
  return { next: even ? [buffer, even.next] : [buffer], data, checked: direction }
}

/** Newton-Schulz in float16 of a float32 matrix, with a float32 result. */
function halfNewtonSchulz(
  graph: Graph,
  x: string,
  { coefficients, tall }: Pick<MuonOptions, 'coefficients' | 'tall'>,
): string {
  const { iterations, output_scale } = halfIterations(coefficients)
  const o = newtonSchulz(graph, graph.cast(x, 'float16'), { iterations, tall })
  return graph.mul(graph.cast(o, 'float32'), graph.constant(output_scale))
}
