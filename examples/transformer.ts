import { Graph } from '../kernels/graph/graph.js'
import { type Attention, attention, attentionGradient, type Heads, heads, type Maps } from './attention.js'
import {
  BYTES,
  crossEntropy,
  embeddingGradient,
  gradientName,
  loadNetwork,
  type Model,
  maxLogitsName,
  throughRelu,
  type Weight,
} from './network.js'

/**
 * The sizes: bytes of context, width of the residual stream, heads of an attention, inner width of each layer's MLP.
 */
export type Size = { context: number; width: number; heads: number; mlp: readonly number[] }

/** The sizes of a batch: `batch` sequences of `size.context` tokens; the model predicts the byte behind each token. */
type Sizes = { size: Size; batch: number }

/** Every weight, in the order in which the forward pass uses them. */
export function weightsOf({ width, mlp }: Size): Weight[] {
  return [
    { name: 'embedding', shape: [BYTES, width], hidden: false },
    ...mlp.flatMap((inner, i): Weight[] => [
      ...Object.values(mapsOf(i)).map((name): Weight => ({ name, shape: [width, width], hidden: true })),
      { name: upOf(i), shape: [inner, width], hidden: true },
      { name: downOf(i), shape: [width, inner], hidden: true },
    ]),
    { name: 'head', shape: [BYTES, width], hidden: false },
  ]
}

/** The attentions for QK-clip: which weights make their queries and keys. */
export function attentionsOf(size: Size) {
  return size.mlp.map((_, i) => {
    const { query, key } = mapsOf(i)
    return { name: attentionOf(i), heads: size.heads, headDim: size.width / size.heads, query, key }
  })
}

/** Loads the model for batches of `batch` sequences: tokens and targets [batch * context]. */
export function loadTransformer(size: Size, batch: number, threads?: number): Promise<Model> {
  const loss = new Graph('loss')
  forwardPass(loss, { size, batch })
  const gradients = new Graph('gradients')
  backwardPass(gradients, forwardPass(gradients, { size, batch }), size)
  const count = [batch * size.context]
  return loadNetwork({ weights: weightsOf(size), tokens: count, targets: count, loss, gradients }, threads)
}

/** The floating point operations of all matrix products of a forward and backward pass over a batch. */
export function transformerFlops(size: Size, batch: number): number {
  const tokens = batch * size.context
  // A weight is in three products of 2·tokens operations per element: forward, its own gradient, its input's
  // gradient. The embedding is looked up, and its gradient is a product with one-hot rows.
  const weights = weightsOf(size).map(({ name, shape: [rows, columns] }) => {
    return (name === 'embedding' ? 2 : 6) * rows * columns * tokens
  })
  const attentions = 12 * size.context * size.width * tokens * size.mlp.length
  return weights.reduce((sum, flops) => sum + flops, attentions)
}

type Norm = { output: string; inverse: string }
type Layer = { first: Norm; attention: Attention; second: Norm; relu: string }
type Forward = { layers: Layer[]; last: Norm; errors: () => string; heads: Heads }

/**
 *   x = embedding[tokens] ;  x <- x + attention(norm(x)) ;  x <- x + relu(norm(x) upᵀ) downᵀ ;  logits = norm(x) headᵀ
 */
function forwardPass(graph: Graph, { size, batch }: Sizes): Forward {
  const tokens = batch * size.context
  for (const { name, shape } of weightsOf(size)) graph.input(name, 'float32', shape)
  graph.input('tokens', 'int64', [tokens])
  graph.input('targets', 'int64', [tokens])
  const shared = heads(graph, { ...size, batch, headDim: size.width / size.heads })
  const layers: Layer[] = []
  let x = graph.node('Gather', ['embedding', 'tokens'])
  for (const i of size.mlp.keys()) {
    const first = norm(graph, x)
    const attended = attention(graph, { input: first.output, maps: mapsOf(i), heads: shared })
    x = graph.gemm(attended.mixed, mapsOf(i).output, { transB: true, c: x })
    const second = norm(graph, x)
    const relu = graph.node('Relu', [graph.gemm(second.output, upOf(i), { transB: true })])
    x = graph.gemm(relu, downOf(i), { transB: true, c: x })
    layers.push({ first, attention: attended, second, relu })
  }
  const last = norm(graph, x)
  const errors = crossEntropy(graph, graph.gemm(last.output, 'head', { transB: true }), tokens)
  return { layers, last, errors, heads: shared }
}

/** With z = h wᵀ and y = dL/dz: dL/dw = yᵀ h and dL/dh = y w. A residual adds the gradients of its two branches. */
function backwardPass(graph: Graph, { layers, last, errors, heads }: Forward, size: Size): void {
  const y = errors()
  const gradient = (name: string, y: string, input: string) =>
    graph.output(gradientName(name), graph.gemm(y, input, { transA: true }))
  gradient('head', y, last.output)
  let flowing = normGradient(graph, graph.gemm(y, 'head'), last)
  for (const i of [...size.mlp.keys()].reverse()) {
    const { first, attention, second, relu } = layers[i]
    gradient(downOf(i), flowing, relu)
    const inner = throughRelu(graph, graph.gemm(flowing, downOf(i)), relu)
    gradient(upOf(i), inner, second.output)
    flowing = graph.add(flowing, normGradient(graph, graph.gemm(inner, upOf(i)), second))
    const maps = mapsOf(i)
    gradient(maps.output, flowing, attention.mixed)
    const mixed = graph.gemm(flowing, maps.output)
    const { query, key, value } = attentionGradient(graph, mixed, { attention, heads })
    for (const [map, y] of Object.entries({ query, key, value })) gradient(maps[map as keyof Maps], y, first.output)
    graph.output(maxLogitsName(attentionOf(i)), attention.maxLogits)
    const values = graph.gemm(value, maps.value)
    const keys = graph.gemm(key, maps.key, { c: values })
    flowing = graph.add(flowing, normGradient(graph, graph.gemm(query, maps.query, { c: keys }), first))
  }
  embeddingGradient(graph, 'tokens', flowing)
}

/** RMS norm without a gain: n = x·r, r = 1 / sqrt(mean x² + 1e-6) over each row. */
function norm(graph: Graph, x: string): Norm {
  const mean = graph.reduce('ReduceMean', graph.mul(x, x), { axes: [1], keepdims: true })
  const inverse = graph.node('Reciprocal', [graph.node('Sqrt', [graph.add(mean, graph.constant(1e-6))])])
  return { output: graph.mul(x, inverse), inverse }
}

/** dL/dx = r (y - n·mean(y·n)), y = dL/dn. */
function normGradient(graph: Graph, y: string, { output, inverse }: Norm): string {
  const mean = graph.reduce('ReduceMean', graph.mul(y, output), { axes: [1], keepdims: true })
  return graph.mul(inverse, graph.sub(y, graph.mul(output, mean)))
}

const attentionOf = (layer: number): string => `attention${layer}`
const upOf = (layer: number): string => `up${layer}`
const downOf = (layer: number): string => `down${layer}`
const mapsOf = (layer: number) =>
  ({ query: `query${layer}`, key: `key${layer}`, value: `value${layer}`, output: `output${layer}` }) satisfies Maps
