import type { Graph } from './graph/graph.js'
import { SMALLEST_NORMAL } from './orthogonalize/newton-schulz.js'

/** The floor of the second momentum under the root, as in the paper's code. */
export const SECOND_MOMENTUM_FLOOR = 1e-10

/**
 * NorMuon (arXiv 2510.05491): v = mean of O² over each row (`row`) or each column (`col`), V' = b_v·V + b_g·v, and
 * data = O/√max(V', 1e-10), rescaled to the Frobenius norm of O. V is the input `second_momentum`; a replay has
 * b = (1, 0).
 *
 * The rescaling needs no second pass over the matrix: with n the length of a row (or column), ‖O‖² = n·Σv, and before
 * the rescaling ‖data‖² = n·Σ v/max(V', 1e-10). For a zero matrix both are zero, and it stays zero.
 */
export function normuon(graph: Graph, o: string, per: 'row' | 'col'): { next: string; data: string } {
  const v = graph.reduce('ReduceMean', graph.mul(o, o), { axes: [per === 'row' ? 1 : 0], keepdims: true })
  const next = graph.add(graph.mul('second_momentum', 'b_v'), graph.mul(v, 'b_g'))
  const floored = graph.node('Max', [next, graph.constant(SECOND_MOMENTUM_FLOOR)])
  const [before, after] = [v, graph.div(v, floored)].map((squares) => graph.reduce('ReduceSum', squares))
  const factor = graph.node('Sqrt', [graph.div(before, graph.node('Max', [after, graph.constant(SMALLEST_NORMAL)]))])
  return { next, data: graph.mul(o, graph.div(factor, graph.node('Sqrt', [floored]))) }
}
