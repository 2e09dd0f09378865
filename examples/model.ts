import { Graph } from '../kernels/graph/graph.js'
import {
  BYTES,
  crossEntropy,
  embeddingGradient,
  gradientName,
  loadNetwork,
  type Model,
  throughRelu,
  type Weight,
} from './network.js'

/** The sizes of the model: bytes of context, width of a byte's embedding, width of the hidden layers. */
export type Size = { context: number; embedding: number; hidden: number }

export const SIZE: Size = { context: 16, embedding: 32, hidden: 256 }

const RESIDUAL_LAYERS = ['w2', 'w3'] as const

/** Every weight of the model, in the order in which the forward pass uses them. */
export function weightsOf({ context, embedding, hidden }: Size): Weight[] {
  return [
    { name: 'embedding', shape: [BYTES, embedding], hidden: false },
    { name: 'w1', shape: [hidden, context * embedding], hidden: true },
    ...RESIDUAL_LAYERS.map((name): Weight => ({ name, shape: [hidden, hidden], hidden: true })),
    { name: 'head', shape: [BYTES, hidden], hidden: false },
  ]
}

/** Loads the model for batches of `batch` examples: tokens [batch, context], targets [batch]. */
export function loadModel(size: Size, batch: number): Promise<Model> {
  const loss = new Graph('loss')
  forwardPass(loss, size, batch)
  const gradients = new Graph('gradients')
  backwardPass(gradients, forwardPass(gradients, size, batch), { size, batch })
  return loadNetwork({ weights: weightsOf(size), tokens: [batch, size.context], targets: [batch], loss, gradients })
}

type Layer = { name: string; input: string; relu: string }
type Forward = { first: Layer; residual: Layer[]; last: string; errors: () => string }

/**
 *   x = embedding[tokens] ;  h = relu(x w1ᵀ) ;  h <- h + relu(h wᵀ) for w2, w3 ;  logits = h headᵀ
 */
function forwardPass(graph: Graph, size: Size, batch: number): Forward {
  for (const { name, shape } of weightsOf(size)) graph.input(name, 'float32', shape)
  graph.input('tokens', 'int64', [batch, size.context])
  graph.input('targets', 'int64', [batch])
  const looked = graph.node('Gather', ['embedding', 'tokens'])
  const first = layer(graph, 'w1', graph.node('Reshape', [looked, graph.ints([batch, size.context * size.embedding])]))
  const residual: Layer[] = []
  let last = first.relu
  for (const name of RESIDUAL_LAYERS) {
    const next = layer(graph, name, last)
    residual.push(next)
    last = graph.add(last, next.relu)
  }
  const errors = crossEntropy(graph, graph.gemm(last, 'head', { transB: true }), batch)
  return { first, residual, last, errors }
}

/** With z = h wᵀ and y = dL/dz: dL/dw = yᵀ h and dL/dh = y w. */
function backwardPass(graph: Graph, forward: Forward, { size, batch }: { size: Size; batch: number }): void {
  const errors = forward.errors()
  const gradient = (name: string, y: string, input: string) =>
    graph.output(gradientName(name), graph.gemm(y, input, { transA: true }))
  gradient('head', errors, forward.last)
  let flowing = graph.gemm(errors, 'head')
  for (const { name, input, relu } of forward.residual.toReversed()) {
    const y = throughRelu(graph, flowing, relu)
    gradient(name, y, input)
    flowing = graph.gemm(y, name, { c: flowing })
  }
  const y = throughRelu(graph, flowing, forward.first.relu)
  gradient('w1', y, forward.first.input)
  const rows = graph.node('Reshape', [graph.gemm(y, 'w1'), graph.ints([batch * size.context, size.embedding])])
  const tokens = graph.node('Reshape', ['tokens', graph.ints([batch * size.context])])
  embeddingGradient(graph, tokens, rows)
}

function layer(graph: Graph, name: string, input: string): Layer {
  return { name, input, relu: graph.node('Relu', [graph.gemm(input, name, { transB: true })]) }
}
