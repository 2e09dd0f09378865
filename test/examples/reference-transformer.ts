import type { Examples } from '../../examples/text.js'
import type { Size } from '../../examples/transformer.js'

type Weights = Record<string, Float64Array>

/** The transformer's results for a batch: the loss in nats per byte, and `maxLogits` [layer][head]. */
type Outputs = { loss: number; maxLogits: number[][] }

/** The transformer once more in float64 and plain loops, one sequence and one position at a time. */
export function referenceTransformer(weights: Weights, examples: Examples, size: Size): Outputs {
  const { context, mlp, heads } = size
  const count = examples.targets.length
  const maxLogits = mlp.map(() => Array.from({ length: heads }, () => -Infinity))
  let loss = 0
  for (let start = 0; start < count; start += context) {
    const tokens = [...examples.tokens.subarray(start, start + context)].map(Number)
    let x = tokens.map((token) => [...weights.embedding.subarray(token * size.width, (token + 1) * size.width)])
    mlp.forEach((_, layer) => {
      const mixed = mix(weights, x.map(normalized), { size, layer, maxLogits: maxLogits[layer]! })
      x = x.map((row, t) => sum(row, times(weights[`output${layer}`]!, mixed[t]!)))
      x = x.map((row) => {
        const inner = times(weights[`up${layer}`]!, normalized(row)).map((value) => Math.max(0, value))
        return sum(row, times(weights[`down${layer}`]!, inner))
      })
    })
    x.forEach((row, t) => {
      const logits = times(weights.head, normalized(row))
      const normalizer = Math.log(logits.reduce((total, logit) => total + Math.exp(logit), 0))
      loss += (normalizer - logits[Number(examples.targets[start + t])]!) / count
    })
  }
  return { loss, maxLogits }
}

/** The mixed values of all heads, side by side; `maxLogits` is raised to the largest logit of each head. */
function mix(
  weights: Weights,
  inputs: number[][],
  { size, layer, maxLogits }: { size: Size; layer: number; maxLogits: number[] },
): number[][] {
  const rows = (name: string) => inputs.map((input) => times(weights[`${name}${layer}`]!, input))
  const [queries, keys, values] = [rows('query'), rows('key'), rows('value')]
  const dim = size.width / size.heads
  const part = (row: number[], head: number) => row.slice(head * dim, (head + 1) * dim)
  return inputs.map((_, t) =>
    maxLogits.flatMap((_, head) => {
      const query = turned(part(queries[t]!, head), t)
      const logits = keys.slice(0, t + 1).map((key, s) => dot(query, turned(part(key, head), s)) / Math.sqrt(dim))
      maxLogits[head] = Math.max(maxLogits[head]!, ...logits)
      const exponentials = logits.map((logit) => Math.exp(logit - Math.max(...logits)))
      const total = exponentials.reduce((one, other) => one + other, 0)
      return Array.from({ length: dim }, (_, i) =>
        exponentials.reduce((mixed, weight, s) => mixed + (weight / total) * part(values[s]!, head)[i]!, 0),
      )
    }),
  )
}

/** Rotary embedding: multiplies the complex numbers x_i + i·x_(i + d/2) by e^(iθ), θ = position · 10000^(-2i / d). */
function turned(x: number[], position: number): number[] {
  const half = x.length / 2
  const turn = (i: number): [number, number] => {
    const angle = position / 10000 ** (i / half)
    const [real, imaginary] = [x[i]!, x[i + half]!]
    return [real * Math.cos(angle) - imaginary * Math.sin(angle), real * Math.sin(angle) + imaginary * Math.cos(angle)]
  }
  const pairs = Array.from({ length: half }, (_, i) => turn(i))
  return [...pairs.map(([real]) => real), ...pairs.map(([, imaginary]) => imaginary)]
}

function normalized(x: number[]): number[] {
  const rms = Math.sqrt(dot(x, x) / x.length + 1e-6)
  return x.map((value) => value / rms)
}

function times(matrix: Float64Array | undefined, vector: number[]): number[] {
  return Array.from({ length: matrix!.length / vector.length }, (_, row) =>
    vector.reduce((total, value, column) => total + value * matrix![row * vector.length + column]!, 0),
  )
}

function dot(one: number[], other: number[]): number {
  return one.reduce((total, value, i) => total + value * other[i]!, 0)
}

function sum(one: number[], other: number[]): number[] {
  return one.map((value, i) => value + other[i]!)
}
