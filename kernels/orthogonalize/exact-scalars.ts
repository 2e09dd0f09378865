import type { Triple } from './coefficients.js'

/**
 * One Newton-Schulz iteration as matrix products carry it out: A = α·YYᵀ, Z = γ·AA + β·A, Y' = δ·Y + ZY.
 * With α = 1, β = b, γ = c and δ = a this is the iteration of the triple (a, b, c).
 */
export type Iteration = {
  readonly alpha: number
  readonly beta: number
  readonly gamma: number
  readonly delta: number
}

/**
 * Iterations that begin with Y = X: the last Y times `output_scale` is the orthogonalized matrix. `error` is the
 * largest relative difference between a scalar and the one that the coefficients ask for.
 */
export type Iterations = {
  readonly iterations: readonly Iteration[]
  readonly output_scale: number
  readonly error: number
}

/** The published iterations, for float32 arithmetic: its scalars need no search. */
export function plainIterations(coefficients: readonly Triple[]): Iteration[] {
  return coefficients.map(([a, b, c]) => ({ alpha: 1, beta: b, gamma: c, delta: a }))
}

// Float16 keeps ten bits behind the leading one: 1024 of its numbers lie between two powers of two.
const PER_BINADE = 1024
// A thousandth of the error of rounding a product to float16: closer scalars would make no difference.
const GOOD_ENOUGH = 5e-7

/**
 * Iterations whose every scalar is a float16 number. cuBLAS rounds alpha and beta of a half-precision product to
 * float16: of the published coefficients this rounding alone moves the result by 4e-3 to 7e-3, several times the
 * arithmetic's error.
 *
 * The scale of Y and the factor of A are free, so exact scalars can be searched for: with X = sY and X' = s'Y',
 * δ = a·s/s', βα = b·s²·δ/a and γα² = c·s⁴·δ/a. A grid over α and δ finds β and γ that are nearly float16 numbers.
 */
export function halfIterations(coefficients: readonly Triple[]): Iterations {
  const iterations: Iteration[] = []
  let scale = 1
  let error = 0
  for (const triple of coefficients) {
    const found = search(triple, scale)
    iterations.push(found.iteration)
    error = Math.max(error, found.error)
    scale *= triple[0] / found.iteration.delta
  }
  return { iterations, output_scale: scale, error }
}

function search([a, b, c]: Triple, scale: number): { iteration: Iteration; error: number } {
  const deltas = halvesAround(a * scale)
  let best = { iteration: { alpha: 1, beta: 0, gamma: 0, delta: a }, error: Number.POSITIVE_INFINITY }
  for (const alpha of halvesAround(1)) {
    const beta = (b * scale ** 2) / (a * alpha)
    const gamma = (c * scale ** 4) / (a * alpha ** 2)
    for (const delta of deltas) {
      const error = Math.max(halfError(beta * delta), halfError(gamma * delta))
      if (error >= best.error) continue
      best = { iteration: { alpha, beta: toHalf(beta * delta), gamma: toHalf(gamma * delta), delta }, error }
      if (error < GOOD_ENOUGH) return best
    }
  }
  return best
}

/** The float16 numbers from `middle`/√2 to `middle`·√2. */
export function halvesAround(middle: number): number[] {
  const low = middle / Math.SQRT2
  const start = 2 ** Math.floor(Math.log2(low))
  const numbers = Array.from({ length: 2 * PER_BINADE }, (_, i) => {
    return start * (i < PER_BINADE ? 1 + i / PER_BINADE : 2 * (i / PER_BINADE))
  })
  return numbers.filter((number) => number >= low && number <= 2 * low)
}

/** The relative distance of x to its nearest float16 number. */
export function halfError(x: number): number {
  return x === 0 ? 0 : Math.abs(toHalf(x) / x - 1)
}

/**
 * The nearest number of eleven significant bits (Veltkamp's splitting): a float16 number if |x| is in the normal range.
 */
export function toHalf(x: number): number {
  const spread = x * (2 ** 42 + 1)
  return spread - (spread - x)
}
