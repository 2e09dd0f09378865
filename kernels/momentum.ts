import type { Graph } from './graph/graph.js'

/**
 * Adds B' = c_m·B + c_g·G and u = n_m·B' + n_g·G for the inputs `momentum_buffer`, `c_m`, `c_g`, `n_m`, `n_g`.
 *
 * Four scalars give every form with one graph (μ momentum, τ dampening):
 * ema (1-μ)G + μB: c = (μ, 1-μ), n = (μ, 1-μ) with Nesterov, (1, 0) without;
 * heavy ball μB + (1-τ)G: c = (μ, 1-τ), n = (μ, 1) or (1, 0);
 * replay, where B is already B': c = (1, 0) and n as the first time. Then 1·B' + 0·G is B' bit for bit, the sign of
 * a zero included, because 0·G and c_g·G have the same sign.
 *
 * A buffer of bfloat16 is B' rounded to nearest even, and u is made of the rounded B', because a replay has no other.
 */
export function momentum(
  graph: Graph,
  gradient: string,
  dtype: 'float32' | 'bfloat16' = 'float32',
): { buffer: string; direction: string } {
  const narrow = dtype === 'bfloat16'
  const before = narrow ? graph.cast('momentum_buffer', 'float32') : 'momentum_buffer'
  const exact = graph.add(graph.mul(before, 'c_m'), graph.mul(gradient, 'c_g'))
  const buffer = narrow ? graph.cast(exact, 'bfloat16') : exact
  const kept = narrow ? graph.cast(buffer, 'float32') : buffer
  const direction = graph.add(graph.mul(kept, 'n_m'), graph.mul(gradient, 'n_g'))
  return { buffer, direction }
}
