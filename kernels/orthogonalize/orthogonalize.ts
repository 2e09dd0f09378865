import { Graph } from '../graph/graph.js'
import type { Triple } from './coefficients.js'
import { halfIterations } from './exact-scalars.js'
import { gramNewtonSchulz, halfSegments } from './gram-newton-schulz.js'
import { newtonSchulz } from './newton-schulz.js'

/** One half-precision Newton-Schulz: `tall` says rows > cols; the `direct` form iterates on X, `gram` on XXᵀ. */
export type OrthogonalizeSpec = {
  readonly coefficients: readonly Triple[]
  readonly tall: boolean
  readonly form: 'direct' | 'gram'
}

/** The model of an OrthogonalizeSpec: its input is u/‖u‖ times `input_scale`, O is its output times `output_scale`. */
export type Orthogonalize = {
  readonly model: Uint8Array
  readonly input_scale: number
  readonly output_scale: number
}

/** The model's input `x` and its output `o` are float16 [rows, cols]. */
export function buildOrthogonalize({ coefficients, tall, form }: OrthogonalizeSpec): Orthogonalize {
  const graph = new Graph(`newton_schulz_${form}`)
  const dims = ['rows', 'cols']
  const x = graph.input('x', 'float16', dims)
  const finish = (o: string, scales: { input_scale: number; output_scale: number }) => {
    graph.output('o', o, { dtype: 'float16', dims })
    return { model: graph.bytes(), ...scales }
  }
  if (form === 'gram') {
    const found = halfSegments(coefficients)
    const { input_scale, output_scale } = found
    return finish(gramNewtonSchulz(graph, x, { ...found, tall }), { input_scale, output_scale })
  }
  const { iterations, output_scale } = halfIterations(coefficients)
  return finish(newtonSchulz(graph, x, { iterations, tall }), { input_scale: 1, output_scale })
}

// The Gram form has products of the shorter side in place of products with the longer: it is faster from this ratio on.
// bench/gpu/forms.ts measures both forms by the ratio.
const GRAM_ASPECT = 2
// Of smaller matrices the Gram form is less exact (64x256: 3.6e-3, direct 1.7e-3), and launches take most of the time.
const GRAM_FROM = 512

/** The faster form for a matrix of rows x cols. */
export function formFor(rows: number, cols: number): OrthogonalizeSpec['form'] {
  const shorter = Math.min(rows, cols)
  return shorter >= GRAM_FROM && Math.max(rows, cols) >= GRAM_ASPECT * shorter ? 'gram' : 'direct'
}
