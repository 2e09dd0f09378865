import type { Triple } from './coefficients.js'
import type { Graph } from './graph.js'
import { plainIterations } from './half.js'
import type { KernelValues } from './kernel.js'
import { momentum } from './momentum.js'
import { newtonSchulz, normalize } from './newton-schulz.js'

/** Muon: momentum, then the orthogonalized direction times `output_scale`. Formulas: momentum.ts, newton-schulz.ts. */
export function muon(
  graph: Graph,
  gradient: string,
  { coefficients, tall }: { coefficients: readonly Triple[]; tall: boolean },
): KernelValues {
  const { buffer, direction } = momentum(graph, gradient)
  const orthogonalized = newtonSchulz(graph, normalize(graph, direction, 'eps'), {
    iterations: plainIterations(coefficients),
    tall,
  })
  // A buffer that is not finite makes the direction not finite, whatever n_m is (0·∞ is NaN): one check covers both.
  return { next: [buffer], data: graph.mul(orthogonalized, 'output_scale'), checked: direction }
}
