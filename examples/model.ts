import assert from 'node:assert'
import { InferenceSession, Tensor } from 'onnxruntime-node'
import { Graph } from '../kernels/graph.js'
import type { Examples } from './text.js'

/** The sizes of the model: bytes of context, width of a byte's embedding, width of the hidden layers. */
export type Size = { context: number; embedding: number; hidden: number }

/** One weight as torch stores it, out x in. `hidden` says whether it maps hidden features: those are Muon's. */
export type Weight = { name: string; shape: readonly [number, number]; hidden: boolean }

/** Weights or gradients by name, each [shape[0] * shape[1]] in C order. */
export type Tensors = Record<string, Float32Array>

export type Model = {
  /** Mean cross entropy in nats per byte and its gradient for every weight; `examples` is one batch. */
  gradients(weights: Tensors, examples: Examples): Promise<{ loss: number; gradients: Tensors }>
  /** Mean cross entropy in nats per byte over any multiple of a batch. */
  loss(weights: Tensors, examples: Examples): Promise<number>
}

export const SIZE: Size = { context: 16, embedding: 32, hidden: 256 }

const BYTES = 256
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

/** Gaussian weights of variance 1 / columns (1 for the embedding, whose rows are looked up, not multiplied). */
export function initialWeights(size: Size, random: () => number): Tensors {
  const entries = weightsOf(size).map(({ name, shape: [rows, columns] }) => {
    const deviation = name === 'embedding' ? 1 : columns ** -0.5
    return [name, Float32Array.from({ length: rows * columns }, () => deviation * gaussian(random))]
  })
  return Object.fromEntries(entries)
}

/**
 * Loads the model for batches of `batch` examples. Forward and backward are ONNX graphs run by onnxruntime-node, as
 * they would be PyTorch or JAX elsewhere: loops in JavaScript would take minutes.
 */
export async function loadModel(size: Size, batch: number): Promise<Model> {
  const forward = await session(lossGraph(size, batch))
  const backward = await session(gradientGraph(size, batch))
  const feed = (weights: Tensors, examples: Examples) => feeds(size, weights, { ...examples, batch })
  return {
    async gradients(weights, examples) {
      const { loss, ...rest } = await backward.run(feed(weights, examples))
      return { loss: scalar(loss), gradients: gradientsIn(rest) }
    },
    async loss(weights, { tokens, targets }) {
      let sum = 0
      for (let at = 0; at < targets.length; at += batch) {
        const part = {
          tokens: tokens.subarray(at * size.context, (at + batch) * size.context),
          targets: targets.subarray(at, at + batch),
        }
        sum += scalar((await forward.run(feed(weights, part))).loss) * batch
      }
      return sum / targets.length
    },
  }
}

function lossGraph(size: Size, batch: number): Uint8Array {
  const graph = new Graph('loss')
  forwardPass(graph, size, batch)
  return graph.bytes()
}

function gradientGraph(size: Size, batch: number): Uint8Array {
  const graph = new Graph('gradients')
  backwardPass(graph, forwardPass(graph, size, batch), { size, batch })
  return graph.bytes()
}

type Layer = { name: string; input: string; relu: string }
type Forward = { first: Layer; residual: Layer[]; last: string; probabilities: string; targets: string }

/**
 *   x = embedding[tokens] ;  h = relu(x w1ᵀ) ;  h <- h + relu(h wᵀ) for w2, w3 ;  p = softmax(h headᵀ)
 *   loss = -mean log p[target]
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
  const logarithms = graph.node('LogSoftmax', [graph.gemm(last, 'head', { transB: true })])
  const targets = oneHot(graph, 'targets')
  const likelihood = graph.reduce('ReduceSum', graph.mul(logarithms, targets))
  graph.output('loss', graph.mul(likelihood, graph.constant(-1 / batch)), { dims: [] })
  return { first, residual, last, probabilities: graph.node('Exp', [logarithms]), targets }
}

/** With z = h wᵀ and y = dL/dz: dL/dw = yᵀ h and dL/dh = y w; a looked-up row collects what its tokens received. */
function backwardPass(graph: Graph, forward: Forward, { size, batch }: { size: Size; batch: number }): void {
  const errors = graph.mul(graph.sub(forward.probabilities, forward.targets), graph.constant(1 / batch))
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
  // A product with one-hot rows, not a scatter: its sums have a fixed order, so a run can be repeated to the bit.
  gradient('embedding', oneHot(graph, tokens), rows)
}

function layer(graph: Graph, name: string, input: string): Layer {
  return { name, input, relu: graph.node('Relu', [graph.gemm(input, name, { transB: true })]) }
}

// Where relu(z) > 0 its slope is 1, elsewhere it is 0: the sign of relu(z) either way.
function throughRelu(graph: Graph, flowing: string, relu: string): string {
  return graph.mul(flowing, graph.node('Sign', [relu]))
}

function oneHot(graph: Graph, indices: string): string {
  return graph.node('OneHot', [indices, graph.ints([BYTES]), graph.floats([0, 1], [2])])
}

// Two ONNX Runtimes share this demo's cores, the trainer's and the service's, and work in turn: one that kept its
// threads spinning between runs would take the time from the other.
function session(model: Uint8Array): Promise<InferenceSession> {
  return InferenceSession.create(model, { extra: { session: { intra_op: { allow_spinning: '0' } } } })
}

function feeds(size: Size, weights: Tensors, { tokens, targets, batch }: Examples & { batch: number }) {
  const entries = weightsOf(size).map(({ name, shape }): [string, Tensor] => {
    return [name, new Tensor('float32', weights[name], shape)]
  })
  return {
    ...Object.fromEntries(entries),
    tokens: new Tensor('int64', tokens, [batch, size.context]),
    targets: new Tensor('int64', targets, [batch]),
  }
}

function gradientsIn(outputs: InferenceSession.OnnxValueMapType): Tensors {
  const entries = Object.entries(outputs).map(([name, value]) => [name.slice(gradientName('').length), floats(value)])
  return Object.fromEntries(entries)
}

function gradientName(weight: string): string {
  return `gradient:${weight}`
}

function scalar(value: Tensor): number {
  return floats(value)[0]
}

function floats({ type, data }: Tensor): Float32Array {
  assert(data instanceof Float32Array, `expected a float32 tensor, got ${type}`)
  return data
}

/** One standard normal number from two uniform ones (Box and Muller, 1958). */
function gaussian(random: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())
}
