import assert from 'node:assert'
import { InferenceSession, Tensor } from 'onnxruntime-node'
import type { Graph } from '../kernels/graph/graph.js'
import type { Examples } from './text.js'

/**
 * A weight as torch stores it, out x in. `hidden`: it maps hidden features to hidden features, as Muon's matrices do.
 */
export type Weight = { name: string; shape: readonly [number, number]; hidden: boolean }

/** Weights or gradients by name, each [shape[0] * shape[1]] in C order. */
export type Tensors = Record<string, Float32Array>

/** The largest softmax input of every head by attention; empty for a model without attentions. */
export type MaxLogits = Record<string, number[]>

export type Model = {
  weights: readonly Weight[]
  /**
   * Mean cross entropy in nats per byte, its gradient for every weight, and the largest logits; `examples` is one
   * batch.
   */
  gradients(weights: Tensors, examples: Examples): Promise<Derivatives>
  /** Mean cross entropy in nats per byte over any multiple of a batch. */
  loss(weights: Tensors, examples: Examples): Promise<number>
}

export type Derivatives = { loss: number; gradients: Tensors; maxLogits: MaxLogits }

/**
 * A model as two ONNX graphs. The inputs of both are the weights by name, and `tokens` and `targets` of a batch; the
 * output of both is `loss`, a scalar. The second one also puts out `gradientName` of each weight and `maxLogitsName`
 * of each attention.
 */
export type Network = {
  weights: readonly Weight[]
  tokens: readonly number[]
  targets: readonly number[]
  loss: Graph
  gradients: Graph
}

export const BYTES = 256

/** The beginnings of the outputs' names. */
const GRADIENT = 'gradient:'
const MAX_LOGITS = 'max_logits:'

export const gradientName = (weight: string): string => `${GRADIENT}${weight}`
export const maxLogitsName = (attention: string): string => `${MAX_LOGITS}${attention}`

/**
 * Loads a model whose forward and backward passes are ONNX graphs in onnxruntime-node, in place of PyTorch or JAX:
 * loops in JavaScript would take minutes. `threads` is the number of threads of an operation; 0 takes every core.
 */
export async function loadNetwork(network: Network, threads = 0): Promise<Model> {
  const forward = await session(network.loss, threads)
  const backward = await session(network.gradients, threads)
  const batch = { tokens: product(network.tokens), targets: product(network.targets) }
  return {
    weights: network.weights,
    async gradients(weights, examples) {
      const outputs = Object.entries(await backward.run(feeds(network, weights, examples)))
      const named = <T>(start: string, of: (value: Tensor) => T): Record<string, T> => {
        const chosen = outputs.filter(([name]) => name.startsWith(start))
        return Object.fromEntries(chosen.map(([name, value]) => [name.slice(start.length), of(value)]))
      }
      return {
        loss: named('loss', floats)[''][0],
        gradients: named(GRADIENT, floats),
        maxLogits: named(MAX_LOGITS, (value) => [...floats(value)]),
      }
    },
    async loss(weights, { tokens, targets }) {
      let sum = 0
      for (let i = 0; i * batch.targets < targets.length; i++) {
        const part = {
          tokens: tokens.subarray(i * batch.tokens, (i + 1) * batch.tokens),
          targets: targets.subarray(i * batch.targets, (i + 1) * batch.targets),
        }
        sum += floats((await forward.run(feeds(network, weights, part))).loss)[0] * batch.targets
      }
      return sum / targets.length
    },
  }
}

/** Gaussian weights of variance 1 / columns (1 for the embedding, whose rows are looked up, not multiplied). */
export function initialWeights(weights: readonly Weight[], random: () => number): Tensors {
  const entries = weights.map(({ name, shape: [rows, columns] }) => {
    const deviation = name === 'embedding' ? 1 : columns ** -0.5
    return [name, Float32Array.from({ length: rows * columns }, () => deviation * gaussian(random))]
  })
  return Object.fromEntries(entries)
}

/**
 * loss = -mean log softmax(logits)[target] over `count` targets, as output `loss`; returns its gradient, p - target.
 */
export function crossEntropy(graph: Graph, logits: string, count: number): () => string {
  const logarithms = graph.node('LogSoftmax', [logits])
  const targets = oneHot(graph, 'targets')
  const likelihood = graph.reduce('ReduceSum', graph.mul(logarithms, targets))
  graph.output('loss', graph.mul(likelihood, graph.constant(-1 / count)), { dims: [] })
  return () => graph.mul(graph.sub(graph.node('Exp', [logarithms]), targets), graph.constant(1 / count))
}

/**
 * The embedding's gradient: each row is the sum of the gradients of its tokens; `tokens` [count], `rows` [count,
 * width]. It is a product with one-hot rows and no scatter: its sums have a fixed order, so a run can be repeated bit
 * for bit.
 */
export function embeddingGradient(graph: Graph, tokens: string, rows: string): void {
  graph.output(gradientName('embedding'), graph.gemm(oneHot(graph, tokens), rows, { transA: true }))
}

// The slope of relu is 1 where relu(z) > 0 and 0 elsewhere: in both cases the sign of relu(z).
export function throughRelu(graph: Graph, flowing: string, relu: string): string {
  return graph.mul(flowing, graph.node('Sign', [relu]))
}

function oneHot(graph: Graph, indices: string): string {
  return graph.node('OneHot', [indices, graph.ints([BYTES]), graph.floats([0, 1], [2])])
}

// Two ONNX Runtimes share the cores, the trainer's and the service's, and work in turn: one that kept its threads
// spinning between runs would take the time from the other.
function session(graph: Graph, threads: number): Promise<InferenceSession> {
  return InferenceSession.create(graph.bytes(), {
    intraOpNumThreads: threads,
    extra: { session: { intra_op: { allow_spinning: '0' } } },
  })
}

function feeds(network: Network, values: Tensors, { tokens, targets }: Examples): Record<string, Tensor> {
  const entries = network.weights.map(({ name, shape }): [string, Tensor] => {
    return [name, new Tensor('float32', values[name], shape)]
  })
  return {
    ...Object.fromEntries(entries),
    tokens: new Tensor('int64', tokens, network.tokens),
    targets: new Tensor('int64', targets, network.targets),
  }
}

function floats({ type, data }: Tensor): Float32Array {
  assert(data instanceof Float32Array, `expected a float32 tensor, got ${type}`)
  return data
}

function product(dims: readonly number[]): number {
  return dims.reduce((size, dim) => size * dim, 1)
}

/** One standard normal number from two uniform ones (Box and Muller, 1958). */
function gaussian(random: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())
}
