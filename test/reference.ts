// Float64 oracles, to be read beside the papers: slow and plain. They share nothing with kernels/ but the type of
// coefficients.
import type { Triple } from '../kernels/orthogonalize/coefficients.js'

/** A matrix, row-major. */
export type Matrix = { rows: number; cols: number; data: Float64Array }

/** Uniform numbers in [0, 1) that depend on the seed only (mulberry32). */
export function seeded(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let x = Math.imul(state ^ (state >>> 15), state | 1)
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61)
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32
  }
}

/** Standard normal numbers (Box-Muller). */
export function gaussian(seed: number, count: number): Float64Array {
  const random = seeded(seed)
  return Float64Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random()),
  )
}

/** ‖a - b‖_F / ‖b‖_F; 0 where both are zero, NaN where `a` is too short. */
export function relativeDistance(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const difference = Float64Array.from(b, (value, index) => a[index] - value)
  const distance = frobenius(difference)
  return distance === 0 ? 0 : distance / frobenius(b)
}

/** The Frobenius norm, computed after a division by the largest element: no tiny or huge matrix loses its norm. */
export function frobenius(values: ArrayLike<number>): number {
  let largest = 0
  for (let i = 0; i < values.length; i++) largest = Math.max(largest, Math.abs(values[i]))
  if (largest === 0) return 0
  let sum = 0
  for (let i = 0; i < values.length; i++) sum += (values[i] / largest) ** 2
  return largest * Math.sqrt(sum)
}

export function transpose({ rows, cols, data }: Matrix): Matrix {
  return { rows: cols, cols: rows, data: data.map((_, i) => data[(i % rows) * cols + Math.floor(i / rows)]) }
}

export function multiply(a: Matrix, b: Matrix): Matrix {
  const data = new Float64Array(a.rows * b.cols)
  for (let i = 0; i < a.rows; i++) {
    const target = data.subarray(i * b.cols, (i + 1) * b.cols)
    for (let k = 0; k < a.cols; k++) {
      const factor = a.data[i * a.cols + k]
      const source = row(b, k)
      for (let j = 0; j < target.length; j++) target[j] += factor * source[j]
    }
  }
  return { rows: a.rows, cols: b.cols, data }
}

/** p(σ) for p the composition of the polynomials aσ + bσ³ + cσ⁵, of which the first triple comes first. */
export function composed(coefficients: readonly Triple[], sigma: number): number {
  let value = sigma
  for (const [a, b, c] of coefficients) value = a * value + b * value ** 3 + c * value ** 5
  return value
}

/** Newton-Schulz by its definition: U·p(Σ)·Vᵀ of X/‖X‖_F = UΣVᵀ, for a matrix of full rank. */
export function orthogonalizeBySvd(x: Matrix, coefficients: readonly Triple[]): Matrix {
  if (x.rows < x.cols) return transpose(orthogonalizeBySvd(transpose(x), coefficients))
  const norm = frobenius(x.data)
  const { us, v, sigma } = svd({ ...x, data: x.data.map((value) => value / norm) })
  // US holds the columns σⱼuⱼ, so p(σⱼ)/σⱼ turns them into p(σⱼ)uⱼ.
  const gain = sigma.map((s) => composed(coefficients, s) / s)
  return multiply({ ...us, data: us.data.map((value, i) => value * gain[i % us.cols]) }, transpose(v))
}

/** Newton-Schulz by its iteration: A = XXᵀ, X <- aX + (bA + cA²)X. Faster than the SVD on larger matrices. */
export function orthogonalizeByIteration(x: Matrix, coefficients: readonly Triple[]): Matrix {
  if (x.rows > x.cols) return transpose(orthogonalizeByIteration(transpose(x), coefficients))
  const norm = frobenius(x.data)
  let value: Matrix = { ...x, data: x.data.map((element) => element / norm) }
  for (const [a, b, c] of coefficients) {
    const gram = multiply(value, transpose(value))
    const square = multiply(gram, gram)
    const polynomial = { ...gram, data: gram.data.map((element, i) => b * element + c * square.data[i]) }
    const product = multiply(polynomial, value)
    value = { ...value, data: value.data.map((element, i) => a * element + product.data[i]) }
  }
  return value
}

/**
 * Singular value decomposition of a matrix with rows >= cols by one-sided Jacobi rotations: columns are rotated in
 * pairs until all are orthogonal (Golub, Van Loan, Matrix Computations, 8.6.3). X = US·Vᵀ, US with columns σⱼuⱼ.
 */
export function svd(x: Matrix): { us: Matrix; v: Matrix; sigma: Float64Array } {
  // Row j of these is column j of US and of V.
  const us = transpose(x)
  const v = identity(x.cols)
  for (let rotated = true; rotated; ) {
    rotated = false
    for (let p = 0; p < x.cols - 1; p++) {
      for (let q = p + 1; q < x.cols; q++) rotated = rotate(us, v, [p, q]) || rotated
    }
  }
  return {
    us: transpose(us),
    v: transpose(v),
    sigma: Float64Array.from({ length: x.cols }, (_, j) => frobenius(row(us, j))),
  }
}

function rotate(us: Matrix, v: Matrix, [p, q]: readonly [number, number]): boolean {
  const [alpha, beta, gamma] = [dot(row(us, p), row(us, p)), dot(row(us, q), row(us, q)), dot(row(us, p), row(us, q))]
  if (Math.abs(gamma) <= 1e-15 * Math.sqrt(alpha * beta)) return false
  const zeta = (beta - alpha) / (2 * gamma)
  const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta))
  const cosine = 1 / Math.hypot(1, t)
  for (const matrix of [us, v]) turn(row(matrix, p), row(matrix, q), [cosine, cosine * t])
  return true
}

function turn(x: Float64Array, y: Float64Array, [cosine, sine]: readonly [number, number]): void {
  for (let i = 0; i < x.length; i++) {
    const [a, b] = [x[i], y[i]]
    x[i] = cosine * a - sine * b
    y[i] = sine * a + cosine * b
  }
}

function identity(size: number): Matrix {
  return {
    rows: size,
    cols: size,
    data: Float64Array.from({ length: size * size }, (_, i) => Number(i % (size + 1) === 0)),
  }
}

function row({ cols, data }: Matrix, index: number): Float64Array {
  return data.subarray(index * cols, (index + 1) * cols)
}

function dot(a: Float64Array, b: Float64Array): number {
  return a.reduce((sum, value, i) => sum + value * b[i], 0)
}

export type MomentumOptions = { momentum: number; nesterov: boolean; momentum_form: 'ema' | 'heavy_ball' }

/**
 * ema (torch.optim.Muon): B <- μB + (1-μ)G, u = (1-μ)G + μB or B. heavy_ball (Moonlight): B <- μB + G, u = G + μB or
 * B.
 */
export function momentumStep(buffer: Float64Array, gradient: ArrayLike<number>, options: MomentumOptions) {
  const { momentum, nesterov, momentum_form } = options
  const weight = momentum_form === 'ema' ? 1 - momentum : 1
  const next = buffer.map((value, i) => momentum * value + weight * gradient[i])
  const direction = nesterov ? next.map((value, i) => weight * gradient[i] + momentum * value) : next
  return { buffer: next, direction }
}

export type AdamwState = { exp_avg: Float64Array; exp_avg_sq: Float64Array }

/** Kingma, Ba (arXiv 1412.6980), Algorithm 1: m̂/(√v̂ + eps) at step t = 1, 2, … */
export function adamwStep(
  state: AdamwState,
  gradient: ArrayLike<number>,
  options: { betas: readonly [number, number]; eps: number; step: number },
): AdamwState & { data: Float64Array } {
  const {
    betas: [beta1, beta2],
    eps,
    step,
  } = options
  const exp_avg = state.exp_avg.map((m, i) => beta1 * m + (1 - beta1) * gradient[i])
  const exp_avg_sq = state.exp_avg_sq.map((v, i) => beta2 * v + (1 - beta2) * gradient[i] ** 2)
  const data = exp_avg.map((m, i) => m / (1 - beta1 ** step) / (Math.sqrt(exp_avg_sq[i] / (1 - beta2 ** step)) + eps))
  return { exp_avg, exp_avg_sq, data }
}

/**
 * The relative error that a float32 average may have against `after` = β·before + (1-β)·G in float64: 1e-6, and more
 * where G cancels most of β·before, because the rounding of `before` is then a larger part of the result.
 */
export function averageLimit(before: ArrayLike<number>, after: ArrayLike<number>, beta: number): number {
  return 1e-6 * Math.max(1, (beta * frobenius(before)) / frobenius(after))
}

/**
 * torch.optim.SGD: the buffer starts as the first gradient (undampened); d = G + μB (nesterov), B, or G without
 * momentum.
 */
export function sgdStep(
  buffer: Float64Array | undefined,
  gradient: Float64Array,
  options: { momentum: number; dampening: number; nesterov: boolean },
): { buffer: Float64Array; data: Float64Array } {
  const { momentum, dampening, nesterov } = options
  const next = buffer?.map((value, i) => momentum * value + (1 - dampening) * gradient[i]) ?? gradient
  const direction = nesterov ? gradient.map((value, i) => value + momentum * next[i]) : next
  return { buffer: next, data: momentum === 0 ? gradient : direction }
}

export type AmsgradState = AdamwState & { max_exp_avg_sq: Float64Array }

/** Reddi, Kale, Kumar (arXiv 1904.09237) as torch has it: Adam with the largest uncorrected v so far under the root. */
export function amsgradStep(
  state: AmsgradState,
  gradient: ArrayLike<number>,
  options: { betas: readonly [number, number]; eps: number; step: number },
): AmsgradState & { data: Float64Array } {
  const { exp_avg, exp_avg_sq } = adamwStep(state, gradient, options)
  const max_exp_avg_sq = exp_avg_sq.map((v, i) => Math.max(v, state.max_exp_avg_sq[i]))
  const [unbias1, unbias2] = options.betas.map((beta) => 1 - beta ** options.step)
  const data = exp_avg.map((m, i) => m / unbias1 / (Math.sqrt(max_exp_avg_sq[i] / unbias2) + options.eps))
  return { exp_avg, exp_avg_sq, max_exp_avg_sq, data }
}

export type RmspropState = { square_avg: Float64Array; momentum_buffer: Float64Array }

/** torch.optim.RMSprop, not centered: v <- αv + (1-α)G², B <- μB + G/(√v + eps), and B is the direction. */
export function rmspropStep(
  { square_avg, momentum_buffer }: RmspropState,
  gradient: ArrayLike<number>,
  { alpha, eps, momentum }: { alpha: number; eps: number; momentum: number },
): RmspropState & { data: Float64Array } {
  const squares = square_avg.map((v, i) => alpha * v + (1 - alpha) * gradient[i] ** 2)
  const buffer = momentum_buffer.map((b, i) => momentum * b + gradient[i] / (Math.sqrt(squares[i]) + eps))
  return { square_avg: squares, momentum_buffer: buffer, data: buffer }
}

/**
 * NorMuon (arXiv 2510.05491) after the orthogonalization: v = mean of O² over the shorter side, V <- β2 V + (1-β2) v,
 * O/√max(V, 1e-10), brought back to ‖O‖. `second` has one number for each line of the longer side; rows if square.
 */
export function normuonStep(
  second: Float64Array,
  o: Matrix,
  beta2: number,
): { second: Float64Array; data: Float64Array } {
  const byRow = o.rows >= o.cols
  const lineOf = (i: number) => (byRow ? Math.floor(i / o.cols) : i % o.cols)
  const next = second.map((value) => beta2 * value)
  for (const [i, x] of o.data.entries()) next[lineOf(i)] += ((1 - beta2) * x * x) / Math.min(o.rows, o.cols)
  const evened = o.data.map((x, i) => x / Math.sqrt(Math.max(next[lineOf(i)], 1e-10)))
  const norm = frobenius(evened)
  const gain = frobenius(o.data) / Math.max(norm, Number.MIN_VALUE)
  return { second: next, data: evened.map((x) => x * gain) }
}
