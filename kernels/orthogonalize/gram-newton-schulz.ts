import type { Graph } from '../graph/graph.js'
import type { Triple } from './coefficients.js'
import { halfError, halvesAround, toHalf } from './exact-scalars.js'

/**
 * A few iterations on R = XXᵀ alone, for a wide X. With R_1 = α·XXᵀ:
 *
 *     Z_k = γ_k·R_k² + β_k·R_k      the iteration is X <- X + Z_k·X
 *     R_{k+1} = ρ_k·(I + Z_k)·R_k·(I + Z_k)
 *     X' = output·(I + Z_n)…(I + Z_1)·X
 *
 * I + W is kept as W: the identity is never added to a matrix that is rounded. All products but the first and the last
 * are of the shorter side alone. For cols = 4·rows that is a third fewer operations than with iterations on X.
 */
export type Segment = {
  readonly alpha: number
  readonly iterations: readonly { readonly beta: number; readonly gamma: number; readonly rho: number }[]
  readonly output: number
}

/** As `Iterations` of exact-scalars.ts; X has to be multiplied with `input_scale` first. */
export type Segments = {
  readonly segments: readonly Segment[]
  readonly input_scale: number
  readonly output_scale: number
  readonly error: number
}

/**
 * Iterations of the first segment; every later one has a single iteration, which is the direct form.
 *
 * Measured with float16 rounding of every product (Gaussian, 768x3072, distance to float64): 3, 1, 1 iterations 1.3e-3,
 * the direct form 1.3e-3, 2 and 3 iterations 4e-3 to 7e-3. While singular values are small W is small, too. Merged with
 * an iteration that brings large ones down to 1, W cancels, and no later iteration undoes its rounding.
 */
export const FIRST_SEGMENT = 3
const NEXT_SEGMENTS = 1

/** The Gram form of Newton-Schulz: `tall` says that X is given as its transpose (rows > cols). */
export function gramNewtonSchulz(graph: Graph, x: string, { segments, tall }: Segments & { tall: boolean }): string {
  return segments.reduce((value, segment) => applySegment(graph, value, { segment, tall }), x)
}

function applySegment(graph: Graph, x: string, { segment, tall }: { segment: Segment; tall: boolean }): string {
  const { alpha, iterations, output } = segment
  let r = graph.gemm(x, x, tall ? { alpha, transA: true } : { alpha, transB: true })
  let w: string | undefined
  for (const [index, { beta, gamma, rho }] of iterations.entries()) {
    const z = graph.gemm(r, r, { c: r, alpha: gamma, beta })
    w = w === undefined ? z : graph.gemm(z, w, { c: graph.add(w, z) })
    if (index === iterations.length - 1) break
    const t = graph.gemm(z, r, { c: r })
    r = graph.gemm(z, t, { c: t, alpha: rho, beta: rho })
  }
  if (w === undefined) throw new Error('a segment has no iteration')
  const scaled = { c: x, alpha: output, beta: output }
  return tall ? graph.gemm(x, w, scaled) : graph.gemm(w, x, scaled)
}

/**
 * Segments whose every scalar is a float16 number, or close to one, for the reason of halfIterations. With X = sY and
 * R = α·YYᵀ an iteration (a, b, c) has β = (b/a)·u and γ = (c/a)·u² for u = s²/α; afterwards s is a·s, and u is a²·u/ρ.
 */
export function halfSegments(coefficients: readonly Triple[]): Segments {
  const segments: Segment[] = []
  let input_scale = 1
  let scale = 1
  let error = 0
  for (let first = 0; first < coefficients.length; ) {
    const triples = coefficients.slice(first, first + (first === 0 ? FIRST_SEGMENT : NEXT_SEGMENTS))
    const found = searchSegment(triples, scale)
    const before = segments.pop()
    // The factor that this segment wants its Y multiplied with becomes the output factor of the segment before.
    if (before === undefined) input_scale = found.factor
    else segments.push({ ...before, output: found.factor })
    segments.push({ ...found.segment, output: 1 })
    scale = triples.reduce((product, [a]) => product * a, scale / found.factor)
    error = Math.max(error, found.error)
    first += triples.length
  }
  const last = segments.pop()
  if (last === undefined) throw new Error('there is no iteration')
  const output = halvesAround(scale)[0]
  return { segments: [...segments, { ...last, output }], input_scale, output_scale: scale / output, error }
}

type Found = { factor: number; segment: Omit<Segment, 'output'>; error: number }

// Each iteration has one free number for two conditions: a grid of a thousand candidates comes this close to both.
const GOOD_ENOUGH = 5e-6

/** Searches the first factor of Y, α and every ρ for values that make each β and γ of the segment a float16 number. */
function searchSegment(triples: readonly Triple[], scale: number): Found {
  let best: Found = { factor: scale, segment: { alpha: 1, iterations: [] }, error: Number.POSITIVE_INFINITY }
  for (const factor of halvesAround(scale)) {
    for (const alpha of halvesAround(1)) {
      const u = (scale / factor) ** 2 / alpha
      if (stepError(triples[0], u) > GOOD_ENOUGH) continue
      const found = follow(triples, u)
      if (found.error >= best.error) continue
      best = { factor, segment: { alpha, iterations: found.iterations }, error: found.error }
      if (best.error < GOOD_ENOUGH) return best
    }
  }
  return best
}

/** The iterations of one segment that starts with u, each with the ρ that suits the next iteration best. */
function follow(triples: readonly Triple[], start: number): { iterations: Segment['iterations']; error: number } {
  let u = start
  let error = 0
  const iterations = triples.map(([a, b, c], index) => {
    const next = triples[index + 1]
    error = Math.max(error, stepError([a, b, c], u))
    const rho = next ? bestRho(next, a * a * u) : 1
    const iteration = { beta: toHalf((b / a) * u), gamma: toHalf((c / a) * u * u), rho }
    u = (a * a * u) / rho
    return iteration
  })
  return { iterations, error }
}

function bestRho(triple: Triple, u: number): number {
  const errors = halvesAround(u).map((rho) => ({ rho, error: stepError(triple, u / rho) }))
  return errors.reduce((least, other) => (other.error < least.error ? other : least)).rho
}

function stepError([a, b, c]: Triple, u: number): number {
  return Math.max(halfError((b / a) * u), halfError((c / a) * u * u))
}
