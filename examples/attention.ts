import type { Graph } from '../kernels/graph/graph.js'

/**
 * The four maps of an attention by the names of their weights, [width, width]; rows of query and key are head-major.
 */
export type Maps = { query: string; key: string; value: string; output: string }

type Sizes = { batch: number; context: number; heads: number; headDim: number }

/** The sizes of a model's attentions, and the constants of their mask and rotation. */
export type Heads = Sizes & { mask: string; cosines: string; sines: string }

/**
 * Results of the forward pass for the backward pass: [batch, heads, context, headDim] unless a field says otherwise.
 */
export type Attention = {
  query: string
  key: string
  value: string
  /** [batch, heads, context, context] */
  probabilities: string
  /** [heads]: the largest softmax input of each head, over the batch, where the mask lets through. */
  maxLogits: string
  /** [batch * context, width]: the input of the output map. */
  mixed: string
}

/** The mask's value: its exponential is 0, and it is finite, so that no difference is NaN. */
const MASKED = -1e30

/** The constants of causal attention with rotary embeddings (arXiv 2104.09864): angles position·10000^(-2i/headDim). */
export function heads(graph: Graph, sizes: Sizes): Heads {
  const { context, headDim } = sizes
  const table = (of: (row: number, column: number) => number, columns: number) =>
    graph.floats(
      Array.from({ length: context * columns }, (_, i) => of(Math.floor(i / columns), i % columns)),
      [context, columns],
    )
  const angle = (position: number, i: number) => position * 10000 ** (-(2 * (i % (headDim / 2))) / headDim)
  return {
    ...sizes,
    mask: table((row, column) => (column <= row ? 0 : MASKED), context),
    cosines: table((position, i) => Math.cos(angle(position, i)), headDim),
    sines: table((position, i) => Math.sin(angle(position, i)), headDim),
  }
}

/**
 *   q = rotated(x wqᵀ), k = rotated(x wkᵀ), v = x wvᵀ
 *   s = q kᵀ / sqrt(headDim) + mask ;  p = softmax(s) ;  mixed = p v
 * per head; `input` is x, [batch * context, width].
 */
export function attention(
  graph: Graph,
  { input, maps, heads }: { input: string; maps: Maps; heads: Heads },
): Attention {
  const headsOf = (map: string) => toHeads(graph, graph.gemm(input, map, { transB: true }), heads)
  const query = rotated(graph, headsOf(maps.query), { heads, sign: 1 })
  const key = rotated(graph, headsOf(maps.key), { heads, sign: 1 })
  const value = headsOf(maps.value)
  const logits = graph.add(product(graph, query, key, { transB: true, alpha: scaleOf(heads) }), heads.mask)
  const probabilities = graph.node('Softmax', [logits])
  const mixed = fromHeads(graph, product(graph, probabilities, value), heads)
  return { query, key, value, probabilities, maxLogits: graph.reduce('ReduceMax', logits, { axes: [0, 2, 3] }), mixed }
}

/** The gradients of the maps' outputs, dL/d(x wᵀ), each [batch * context, width]; `mixed` is dL/dmixed. */
export function attentionGradient(
  graph: Graph,
  mixed: string,
  { attention, heads }: { attention: Attention; heads: Heads },
): { query: string; key: string; value: string } {
  const { query, key, value, probabilities } = attention
  const alpha = scaleOf(heads)
  const y = toHeads(graph, mixed, heads)
  const slopes = softmaxGradient(graph, product(graph, y, value, { transB: true }), probabilities)
  // The transpose of a rotation turns back.
  const back = (turned: string) => fromHeads(graph, rotated(graph, turned, { heads, sign: -1 }), heads)
  return {
    query: back(product(graph, slopes, key, { alpha })),
    key: back(product(graph, slopes, query, { transA: true, alpha })),
    value: fromHeads(graph, product(graph, probabilities, y, { transA: true }), heads),
  }
}

/** ds = p (y - sum y·p), y = dL/dp; where the mask is, p is 0 and so is ds. */
function softmaxGradient(graph: Graph, y: string, probabilities: string): string {
  const sum = graph.reduce('ReduceSum', graph.mul(y, probabilities), { axes: [3], keepdims: true })
  return graph.mul(probabilities, graph.sub(y, sum))
}

/** Turns the pairs (x_i, x_(i + headDim/2)) by their position's angle, or back with sign -1. */
function rotated(graph: Graph, x: string, { heads, sign }: { heads: Heads; sign: 1 | -1 }): string {
  const [first, second] = graph.nodeWithOutputs('Split', [x], {
    count: 2,
    attributes: { axis: { int: 3 }, num_outputs: { int: 2 } },
  })
  const parts = sign === 1 ? [graph.node('Neg', [second]), first] : [second, graph.node('Neg', [first])]
  const quarter = graph.node('Concat', parts, { axis: { int: 3 } })
  return graph.add(graph.mul(x, heads.cosines), graph.mul(quarter, heads.sines))
}

/** [batch * context, width] -> [batch, heads, context, headDim] */
function toHeads(graph: Graph, x: string, { batch, context, heads, headDim }: Heads): string {
  return swapped(graph, graph.node('Reshape', [x, graph.ints([batch, context, heads, headDim])]))
}

/** [batch, heads, context, headDim] -> [batch * context, width] */
function fromHeads(graph: Graph, x: string, { batch, context, heads, headDim }: Heads): string {
  return graph.node('Reshape', [swapped(graph, x), graph.ints([batch * context, heads * headDim])])
}

function swapped(graph: Graph, x: string): string {
  return graph.node('Transpose', [x], { perm: { ints: [0, 2, 1, 3] } })
}

/** alpha·a·b for each batch and head. */
function product(
  graph: Graph,
  a: string,
  b: string,
  options: { transA?: boolean; transB?: boolean; alpha?: number } = {},
): string {
  const { transA = false, transB = false, alpha = 1 } = options
  return graph.node('com.microsoft.FusedMatMul', [a, b], {
    alpha: { float: alpha },
    transA: { int: Number(transA) },
    transB: { int: Number(transB) },
  })
}

function scaleOf({ headDim }: Heads): number {
  return headDim ** -0.5
}
