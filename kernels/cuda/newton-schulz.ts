import type { Triple } from '../orthogonalize/coefficients.js'
import { formFor, type OrthogonalizeSpec } from '../orthogonalize/orthogonalize.js'
import {
  applyProblem,
  type GemmMatrix,
  type GemmProblem,
  gramProblem,
  paddedShape,
  productProblem,
  tileWork,
} from './gemm-plan.js'

/**
 * The matrices that one Newton-Schulz works in, all of float16: `x` is the input, `y` has its shape, the others are
 * square with its shorter side. No matrix but `x` is read before it was written.
 */
export type Workspace = {
  readonly [Name in (typeof WORKSPACE_WIDE)[number] | (typeof WORKSPACE_SQUARE)[number]]: GemmMatrix
}

export const WORKSPACE_WIDE = ['x', 'y'] as const
export const WORKSPACE_SQUARE = ['r', 't', 'z', 'z2', 'w'] as const
export const WORKSPACE_NAMES = [...WORKSPACE_WIDE, ...WORKSPACE_SQUARE]

type Shape = { readonly rows: number; readonly cols: number }
type Form = OrthogonalizeSpec['form']

/** The shape of a matrix of the workspace for an x of this shape. */
export function sizeOf(name: keyof Workspace, { rows, cols }: Shape): Shape {
  const side = Math.min(rows, cols)
  return WORKSPACE_WIDE.some((wide) => wide === name) ? { rows, cols } : { rows: side, cols: side }
}

/** The workspace for an x of this shape; `maps` are in the order of WORKSPACE_NAMES. */
export function workspaceOf(shape: Shape, maps: readonly bigint[]): Workspace {
  const entries = WORKSPACE_NAMES.map((name, i): [string, GemmMatrix] => [
    name,
    { ...sizeOf(name, shape), map: maps[i] },
  ])
  return Object.fromEntries(entries) as Workspace
}

/**
 * Products, launch by launch: those of one launch do not depend on each other. The last one writes the matrix `output`.
 */
export type Steps = { readonly launches: readonly (readonly GemmProblem[])[]; readonly output: 'x' | 'y' }

/** Iterations of one segment of the Gram form, and the singular value squared that their matrices are centred at. */
type Segment = { readonly triples: readonly Triple[]; readonly centre: number }

/**
 * The first segment of the Gram form has three iterations, each later one two; fewer iterations than three are direct.
 * Singular values are small at first, and so are the first segment's Z and W. In a later one Z and W are close to a
 * multiple of I, which is taken off before they are rounded to float16.
 *
 * Emulated with float16 rounding of every product (512x1024, distance to float64 of five iterations of keller_jordan):
 * Gaussian 1.35e-3, the direct form 1.35e-3; with singular values that fall as 1/i 3.3e-3 and 3.5e-3, of which 2.8e-3
 * are the rounding of X. From 0.4 to 1 the centre makes little difference; the smaller, the better where singular
 * values fall.
 */
const FIRST_SEGMENT = { iterations: 3, centre: 0 }
const LATER_SEGMENT = { iterations: 2, centre: 0.5 }
/**
 * The largest product of the a of one segment: by as much it lifts small singular values, and with them the rounding of
 * its R. Of polar_express, whose first three have 116, a segment of three is 3.6e-3 from float64 where singular values
 * fall as 1/√i, and one of two 1.1e-3. The others have at most 60.
 */
const MOST_GROWTH = 64

/**
 * Newton-Schulz of a workspace's x, which is u/‖u‖, wide or tall. Its scalars are float32, so none needs a search. Both
 * wide matrices are overwritten.
 */
export function newtonSchulzSteps(
  workspace: Workspace,
  coefficients: readonly Triple[],
  form = formOf(workspace),
): Steps {
  const launches: GemmProblem[][] = []
  let [source, target]: ['x' | 'y', 'x' | 'y'] = ['x', 'y']
  for (const segment of segmentsOf(coefficients, form)) {
    const between = { from: workspace[source], to: workspace[target] }
    launches.push(...segmentSteps(workspace, segment, between))
    ;[source, target] = [target, source]
  }
  return { launches, output: source }
}

/** The time of a list's products by the number of its matrices, all of one shape, in the unit of planGemm's tiles. */
export function listCost(shape: Shape, coefficients: readonly Triple[], clusters: number): (count: number) => number {
  const workspace = workspaceOf(
    paddedShape(shape),
    WORKSPACE_NAMES.map(() => 0n),
  )
  const launches = newtonSchulzSteps(workspace, coefficients).launches.map(tileWork)
  return (count) => launches.reduce((sum, { tiles, cost }) => sum + Math.ceil((count * tiles) / clusters) * cost, 0)
}

function formOf({ x }: Workspace): Form {
  return formFor(x.rows, x.cols)
}

function segmentsOf(coefficients: readonly Triple[], form: Form): Segment[] {
  if (form === 'direct' || coefficients.length < FIRST_SEGMENT.iterations)
    return coefficients.map((triple) => ({ triples: [triple], centre: 0 }))
  const segments: Segment[] = []
  for (let at = 0; at < coefficients.length; at += segments[segments.length - 1].triples.length) {
    const { iterations, centre } = at === 0 ? FIRST_SEGMENT : LATER_SEGMENT
    segments.push({ triples: withinGrowth(coefficients.slice(at, at + iterations)), centre })
  }
  return segments
}

/** The first of the triples, as many as lift small singular values by at most MOST_GROWTH, and at least one. */
function withinGrowth(triples: readonly Triple[]): readonly Triple[] {
  if (triples.length === 1 || triples.reduce((growth, [a]) => growth * a, 1) <= MOST_GROWTH) return triples
  return withinGrowth(triples.slice(0, -1))
}

type Between = { readonly from: GemmMatrix; readonly to: GemmMatrix }

function segmentSteps(workspace: Workspace, { triples, centre }: Segment, between: Between): GemmProblem[][] {
  if (triples.length === 1) return directSteps(workspace, triples[0], between)
  return mergedSteps(workspace, { triples, centre }, between)
}

/** R = XXᵀ, Z = cRR + bR, X' = aX + ZX. For a cubic c is 0, and X' = aX + bRX needs no Z. */
function directSteps({ r, z }: Workspace, [a, b, c]: Triple, { from, to }: Between): GemmProblem[][] {
  const apply = (w: GemmMatrix, alpha: number) =>
    applyProblem([w, from], to, { alpha, addends: [{ matrix: from, factor: a }] })
  const gram = gramProblem(from, r, 1)
  if (c === 0) return [[gram], [apply(r, b)]]
  return [[gram], [productProblem([r, r], z, { alpha: c, addends: [{ matrix: r, factor: b }] })], [apply(z, 1)]]
}

/** A symmetric matrix as q·I + `rest`, of which only the rest is rounded. */
type Centred = { readonly q: number; readonly rest: GemmMatrix }

/**
 * Several iterations on R = XXᵀ alone. With P = I + (c/a)·R² + (b/a)·R an iteration is
 *
 *     X <- aPX
 *     R <- a²PRP
 *
 * The product of all P is applied once. Each P, and each product of them, is kept as q·I + Z or q·I + W. With r for
 * the centre q is 1 + (c/a)·r² + (b/a)·r, so that Z is small where the eigenvalues of R are close to r.
 */
function mergedSteps(workspace: Workspace, { triples, centre }: Segment, { from, to }: Between): GemmProblem[][] {
  const { r, t, z, z2, w } = workspace
  const launches: GemmProblem[][] = [[gramProblem(from, r, 1)]]
  // The merge of the third P is written over T, which is read no more.
  const [rests, merged] = [
    [z, z2, z],
    [z, w, t],
  ]
  let product: Centred | undefined
  for (const [index, triple] of triples.entries()) {
    const p = polynomial(triple, { r, rest: rests[index], centre })
    launches.push([p.problem])
    const last = index === triples.length - 1
    const steps: GemmProblem[] = product ? [merge(p, product, merged[index])] : []
    if (!last) steps.push(times(p, r, { d: t, factor: 1 }))
    if (steps.length > 0) launches.push(steps)
    if (!last) launches.push([times(p, t, { d: r, factor: triple[0] ** 2 })])
    product = product ? { q: p.q * product.q, rest: merged[index] } : p
  }
  const factor = triples.reduce((all, [a]) => all * a, 1)
  /* c8 ignore next -- a segment has an iteration */
  return product ? [...launches, [applied(product, { from, to, factor })]] : launches
}

/** Z = (c/a)·R² + (b/a)·R - (q - 1)·I for the q of `centre`. */
function polynomial([a, b, c]: Triple, { r, rest, centre }: { r: GemmMatrix; rest: GemmMatrix; centre: number }) {
  const shift = (b * centre + c * centre ** 2) / a
  const addends = [{ matrix: r, factor: b / a }]
  return { q: 1 + shift, rest, problem: productProblem([r, r], rest, { alpha: c / a, addends, diagonal: -shift }) }
}

/** D = factor·(q·I + Z)·M. */
function times(
  { q, rest }: Centred,
  matrix: GemmMatrix,
  { d, factor }: { d: GemmMatrix; factor: number },
): GemmProblem {
  return productProblem([rest, matrix], d, { alpha: factor, addends: [{ matrix, factor: factor * q }] })
}

/** W' of (p·I + Z)·(q·I + W) = pq·I + W': ZW + qZ + pW. */
function merge(p: Centred, product: Centred, w: GemmMatrix): GemmProblem {
  const addends = [
    { matrix: p.rest, factor: product.q },
    { matrix: product.rest, factor: p.q },
  ]
  return productProblem([p.rest, product.rest], w, { alpha: 1, addends })
}

/** X' = factor·(q·I + W)·X. */
function applied({ q, rest }: Centred, { from, to, factor }: Between & { factor: number }): GemmProblem {
  return applyProblem([rest, from], to, { alpha: factor, addends: [{ matrix: from, factor: factor * q }] })
}
