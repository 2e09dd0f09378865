import type { Graph } from '../graph/graph.js'
import type { Iteration } from './exact-scalars.js'

// The smallest normal float32: as a floor of a divisor it turns 0/0 into 0 and changes nothing else.
export const SMALLEST_NORMAL = 2 ** -126

/**
 * X = u / ‖u‖_F for u of any scale; a zero matrix stays zero.
 *
 * u is first divided by its largest absolute value: the sum of squares of the raw numbers would underflow below 1e-23
 * and overflow above 1e19. The norm of the quotient lies between 1 and √(rows·cols), so an `eps` below 1 changes
 * nothing. The norm is made of Mul and ReduceSum, because ReduceL2 needs cuDNN on CUDA.
 */
export function normalize(graph: Graph, u: string, eps: string): string {
  const largest = graph.reduce('ReduceMax', graph.node('Abs', [u]))
  const isPositive = graph.node('Greater', [largest, graph.constant(0)])
  const rescaled = graph.div(u, graph.node('Where', [isPositive, largest, graph.constant(1)]))
  const norm = graph.node('Sqrt', [graph.reduce('ReduceSum', graph.mul(rescaled, rescaled))])
  return graph.div(rescaled, graph.node('Max', [norm, eps, graph.constant(SMALLEST_NORMAL)]))
}

/**
 * One iteration per entry: A = α·XXᵀ, X <- δX + (βA + γA²)X (Keller Jordan, Muon, 2024, where α = 1).
 *
 * For X = UΣVᵀ the result is U·p(Σ)·Vᵀ, p the composition of the odd polynomials of the iterations.
 * A `tall` X iterates from the right with A = XᵀX, so A is always of the shorter side and nothing is transposed.
 * The Gemms add the sums (alpha·AB + beta·C): no elementwise pass over X or A is needed.
 */
export function newtonSchulz(
  graph: Graph,
  x: string,
  { iterations, tall }: { iterations: readonly Iteration[]; tall: boolean },
): string {
  return iterations.reduce((value, iteration) => iterate(graph, value, { ...iteration, tall }), x)
}

function iterate(graph: Graph, x: string, { alpha, beta, gamma, delta, tall }: Iteration & { tall: boolean }): string {
  const gram = graph.gemm(x, x, tall ? { alpha, transA: true } : { alpha, transB: true })
  // A cubic needs no A², and the last product takes the factor β.
  const [polynomial, factor] = gamma === 0 ? [gram, beta] : [graph.gemm(gram, gram, { c: gram, alpha: gamma, beta }), 1]
  const scaled = { c: x, alpha: factor, beta: delta }
  return tall ? graph.gemm(x, polynomial, scaled) : graph.gemm(polynomial, x, scaled)
}
