import { Graph } from '../graph/graph.js'
import type { Triple } from './coefficients.js'
import { halfIterations } from './exact-scalars.js'
import { gramNewtonSchulz, halfSegments } from './gram-newton-schulz.js'
import { newtonSchulz } from './newton-schulz.js'

/** Names one half-precision Newton-Schulz: `tall` says rows > cols, `form` what is iterated on (X itself, or XXᵀ). */
export type OrthogonalizeSpec = {
  readonly coefficients: readonly Triple[]
  readonly tall: boolean
  readonly form: 'direct' | 'gram'
}

/** The ONNX model of an OrthogonalizeSpec. Its input is X = u/‖u‖ times `input_scale`, its output times `output_scale` is O. */
export type Orthogonalize = {
  readonly model: Uint8Array
  readonly input_scale: number
  readonly output_scale: number
}

/** Input `x` and output `o`: float16 [rows, cols]. */
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

// The Gram form trades products with the longer side for products of the shorter: it pays from this aspect ratio on.
const GRAM_ASPECT = 2
// On smaller matrices it is less exact than the direct form (64x256: 3.6e-3 for 1.7e-3), and their time is launches.
const GRAM_FROM = 512

/** The faster form for a matrix of rows x cols. */
export function formFor(rows: number, cols: number): OrthogonalizeSpec['form'] {
  const shorter = Math.min(rows, cols)
  return shorter >= GRAM_FROM && Math.max(rows, cols) >= GRAM_ASPECT * shorter ? 'gram' : 'direct'
}
