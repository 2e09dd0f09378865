import type { Triple } from './coefficients.js'
import type { Graph } from './graph.js'
import { halfIterations, plainIterations } from './half.js'
import type { KernelValues } from './kernel.js'
import { momentum } from './momentum.js'
import { newtonSchulz, normalize } from './newton-schulz.js'

/** Muon: momentum, then the orthogonalized direction times `output_scale`. Formulas: momentum.ts, newton-schulz.ts. */
export function muon(
  graph: Graph,
  gradient: string,
  { coefficients, tall, half }: { coefficients: readonly Triple[]; tall: boolean; half: boolean },
): KernelValues {
  const { buffer, direction } = momentum(graph, gradient)
  const normalized = normalize(graph, direction, 'eps')
  const orthogonalized = half
    ? halfNewtonSchulz(graph, normalized, { coefficients, tall })
    : newtonSchulz(graph, normalized, { iterations: plainIterations(coefficients), tall })
  // A buffer that is not finite makes the direction not finite, whatever n_m is (0·∞ is NaN): one check covers both.
  return { next: [buffer], data: graph.mul(orthogonalized, 'output_scale'), checked: direction }
}

/** Float32 in and out, float16 between. */
function halfNewtonSchulz(
  graph: Graph,
  x: string,
  { coefficients, tall }: { coefficients: readonly Triple[]; tall: boolean },
): string {
  const { iterations, output_scale } = halfIterations(coefficients)
  const o = newtonSchulz(graph, graph.cast(x, 'float16'), { iterations, tall })
  return graph.mul(graph.cast(o, 'float32'), graph.constant(output_scale))
}
