import type { KernelSpec } from './kernel.js'
import type { Triple } from './orthogonalize/coefficients.js'

/**
 * Operations on each element: gradient_scale, the state, the direction, and for Muon its norm and the output scale.
 * Multiplications, additions, divisions, roots and comparisons count one each; the finiteness check does not count.
 */
const PER_ELEMENT: Readonly<Record<KernelSpec['kind'], number>> = { muon: 13, adamw: 12, rmsprop: 11, sgd: 7 }

/** NorMuon squares, sums and scales each element, and has nine operations for each row or column with a statistic. */
const NORMUON = { element: 3, line: 9 } as const

/**
 * Floating point operations of one run of a kernel on a block of `dims`: those of the elementwise part, and for Muon
 * those of Newton-Schulz.
 */
export function kernelFlops(kernel: KernelSpec, dims: readonly number[]): number {
  const elements = dims.reduce((product, size) => product * size, 1)
  const elementwise = PER_ELEMENT[kernel.kind] * elements
  if (kernel.kind === 'adamw' && kernel.amsgrad) return elementwise + elements
  if (kernel.kind !== 'muon') return elementwise
  const second = kernel.second_momentum ? NORMUON.element * elements + NORMUON.line * Math.max(...dims) : 0
  return elementwise + second + newtonSchulzFlops(kernel.coefficients, dims)
}

/**
 * Operations of Newton-Schulz's products as the CPU executes them: also a symmetric one in full. With m the shorter
 * side and n the longer, an iteration is XXᵀ (2m²n), A² (2m³, none where c is 0) and the product with X (2m²n).
 */
export function newtonSchulzFlops(coefficients: readonly Triple[], dims: readonly number[]): number {
  const [shorter, longer] = [Math.min(...dims), Math.max(...dims)]
  const products = coefficients.map(([, , c]) => 4 * shorter ** 2 * longer + (c === 0 ? 0 : 2 * shorter ** 3))
  return products.reduce((sum, flops) => sum + flops, 0)
}
