import type { Triple } from '../orthogonalize/coefficients.js'
import { FIRST_SEGMENT } from '../orthogonalize/gram-newton-schulz.js'
import { formFor } from '../orthogonalize/orthogonalize.js'
import { applyProblem, type GemmMatrix, type GemmProblem, gramProblem, productProblem } from './gemm-plan.js'

/**
 * The matrices that one Newton-Schulz works in, all of float16: `x` is the input, `y` and `v` have its shape, the
 * others are square with its shorter side. No matrix but `x` is read before it was written.
 */
export type Workspace = {
  readonly [Name in (typeof WORKSPACE_WIDE)[number] | (typeof WORKSPACE_SQUARE)[number]]: GemmMatrix
}

export const WORKSPACE_WIDE = ['x', 'y', 'v'] as const
export const WORKSPACE_SQUARE = ['r', 't', 'z', 'z2', 'w', 'w2'] as const

/**
 * Products, launch by launch: those of one launch do not depend on each other. The last one writes the matrix `output`.
 */
export type Steps = { readonly launches: readonly (readonly GemmProblem[])[]; readonly output: 'y' | 'v' }

/** Newton-Schulz of a workspace's x, which is u/‖u‖, wide or tall. Its scalars are float32, so none needs a search. */
export function newtonSchulzSteps(workspace: Workspace, coefficients: readonly Triple[]): Steps {
  const { rows, cols } = workspace.x
  const merges = formFor(rows, cols) === 'gram' && coefficients.length >= FIRST_SEGMENT
  const merged = merges ? FIRST_SEGMENT : 0
  const launches: GemmProblem[][] = merged > 0 ? mergedSteps(workspace, coefficients.slice(0, merged)) : []
  let source: 'x' | 'y' | 'v' = merged > 0 ? 'y' : 'x'
  for (const triple of coefficients.slice(merged)) {
    const target: 'y' | 'v' = source === 'y' ? 'v' : 'y'
    launches.push(...directSteps(workspace, triple, { source, target }))
    source = target
  }
  return { launches, output: source === 'v' ? 'v' : 'y' }
}

/** R = XXᵀ, Z = cRR + bR, X' = aX + ZX. For a cubic c is 0, and X' = aX + bRX needs no Z. */
function directSteps(
  workspace: Workspace,
  [a, b, c]: Triple,
  { source, target }: { source: 'x' | 'y' | 'v'; target: 'y' | 'v' },
): GemmProblem[][] {
  const { r, z } = workspace
  const [from, to] = [workspace[source], workspace[target]]
  const apply = (w: GemmMatrix, alpha: number) =>
    applyProblem([w, from], to, { alpha, addends: [{ matrix: from, factor: a }] })
  const gram = gramProblem(from, r, 1)
  if (c === 0) return [[gram], [apply(r, b)]]
  return [[gram], [productProblem([r, r], z, { alpha: c, addends: [{ matrix: r, factor: b }] })], [apply(z, 1)]]
}

/**
 * Three iterations on R = XXᵀ alone. With Z = (c/a)·R² + (b/a)·R an iteration is
 *
 *     X <- a(I + Z)X
 *     R <- a²(I + Z)R(I + Z)
 *
 * The product (I + Z_3)(I + Z_2)(I + Z_1) is kept as I + W and applied once: y = Πa·(x + Wx).
 */
function mergedSteps(workspace: Workspace, coefficients: readonly Triple[]): GemmProblem[][] {
  const { x, y, r, t } = workspace
  const plain = (left: GemmMatrix, right: GemmMatrix, d: GemmMatrix, factor = 1) =>
    productProblem([left, right], d, { alpha: factor, addends: [{ matrix: right, factor }] })
  const polynomial = ([a, b, c]: Triple, z: GemmMatrix) =>
    productProblem([r, r], z, { alpha: c / a, addends: [{ matrix: r, factor: b / a }] })
  const merge = (z: GemmMatrix, before: GemmMatrix, w: GemmMatrix) => {
    const addends = [
      { matrix: z, factor: 1 },
      { matrix: before, factor: 1 },
    ]
    return productProblem([z, before], w, { alpha: 1, addends })
  }
  const [first, second, third] = coefficients
  const { z, z2, w, w2 } = workspace
  const factor = coefficients.reduce((product, [a]) => product * a, 1)
  return [
    [gramProblem(x, r, 1)],
    [polynomial(first, z)],
    [plain(z, r, t)],
    [plain(z, t, r, first[0] ** 2)],
    [polynomial(second, z2)],
    [merge(z2, z, w), plain(z2, r, t)],
    [plain(z2, t, r, second[0] ** 2)],
    [polynomial(third, z)],
    [merge(z, w, w2)],
    [applyProblem([w2, x], y, { alpha: factor, addends: [{ matrix: x, factor }] })],
  ]
}
