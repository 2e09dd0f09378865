import t from 'tap'
import { initialWeights, type Tensors } from '../../examples/network.js'
import { type Examples, fixedPositions, seededRandom, windowsAt } from '../../examples/text.js'
import { loadTransformer, type Size, transformerFlops, weightsOf } from '../../examples/transformer.js'
import { referenceTransformer } from './reference-transformer.js'

const SIZE: Size = { context: 5, width: 8, heads: 2, mlp: [12, 6] }
const BATCH = 3
const TEXT = Buffer.from('Every byte attends to those before it, and to itself. '.repeat(4))
const model = await loadTransformer(SIZE, BATCH)

// Queries and keys are large, so that the softmax is far from uniform and its gradient matters.
function weightsAndExamples(count = BATCH): { weights: Tensors; examples: Examples } {
  const positions = fixedPositions(TEXT, { count, context: SIZE.context })
  const weights = initialWeights(weightsOf(SIZE), seededRandom(7))
  for (const name of ['query0', 'key0', 'query1', 'key1']) weights[name] = weights[name]!.map((value) => 2 * value)
  return { weights, examples: windowsAt(TEXT, positions, SIZE.context) }
}

const inFloat64 = (weights: Tensors) =>
  Object.fromEntries(Object.entries(weights).map(([name, values]) => [name, Float64Array.from(values)]))

t.test('loss and largest logits are those of the formulas in float64', async (t) => {
  const { weights, examples } = weightsAndExamples()
  const { loss, maxLogits } = await model.gradients(weights, examples)
  const expected = referenceTransformer(inFloat64(weights), examples, SIZE)
  t.ok(Math.abs(loss / expected.loss - 1) < 1e-6, `${loss}, expected ${expected.loss}`)
  t.same(Object.keys(maxLogits).sort(), ['attention0', 'attention1'])
  for (const [layer, heads] of expected.maxLogits.entries()) {
    heads.forEach((logit, head) => {
      const ours = maxLogits[`attention${layer}`]![head]!
      t.ok(Math.abs(ours / logit - 1) < 1e-5, `layer ${layer}, head ${head}: ${ours}, expected ${logit}`)
    })
  }
})

t.test('every gradient is the central difference of the float64 loss', async (t) => {
  const { weights, examples } = weightsAndExamples()
  const { gradients } = await model.gradients(weights, examples)
  t.same(
    Object.keys(gradients).sort(),
    weightsOf(SIZE)
      .map(({ name }) => name)
      .sort(),
  )
  for (const { name } of weightsOf(SIZE)) {
    const indices = sampleOf(gradients[name]!)
    const expected = indices.map((i) => centralDifference(inFloat64(weights), examples, { name, i }))
    const distance = Math.hypot(...indices.map((i, k) => gradients[name]![i]! - expected[k]!)) / Math.hypot(...expected)
    t.ok(distance < 1e-5, `${name}: relative distance ${distance}`)
  }
})

// A difference costs two forward passes in plain loops. Of a long tensor only some elements are checked: the largest,
// and as many spread evenly.
function sampleOf(gradient: Float32Array): number[] {
  const indices = [...gradient.keys()]
  if (indices.length <= 100) return indices
  const largest = indices.toSorted((i, j) => Math.abs(gradient[j]!) - Math.abs(gradient[i]!)).slice(0, 40)
  return [...new Set([...largest, ...indices.filter((i) => i % Math.ceil(indices.length / 40) === 0)])]
}

function centralDifference(
  weights: Record<string, Float64Array>,
  examples: Examples,
  { name, i }: { name: string; i: number },
): number {
  const step = 1e-6
  const lossWith = (change: number) => {
    const moved = weights[name]!.slice()
    moved[i]! += change
    return referenceTransformer({ ...weights, [name]: moved }, examples, SIZE).loss
  }
  return (lossWith(step) - lossWith(-step)) / (2 * step)
}

t.test('the loss over several batches is the mean of theirs', async (t) => {
  const { weights, examples } = weightsAndExamples(2 * BATCH)
  const expected = referenceTransformer(inFloat64(weights), examples, SIZE).loss
  const loss = await model.loss(weights, examples)
  t.ok(Math.abs(loss / expected - 1) < 1e-6, `${loss}, expected ${expected}`)
})

t.test('the same weights and examples give the same bits', async (t) => {
  const { weights, examples } = weightsAndExamples()
  t.same(await model.gradients(weights, examples), await model.gradients(weights, examples))
})

t.test('operations are counted as the products need them', async (t) => {
  // One layer, width 2, inner width 3, two tokens: 4·4 + 2·6 weights in layers and 512 in the head, three products
  // each; 512 in the embedding, one; scores and mixture 2·2·2·2 operations each, three times.
  const flops = transformerFlops({ context: 2, width: 2, heads: 1, mlp: [3] }, 1)
  t.equal(flops, 2 * 2 * (3 * (16 + 12 + 512) + 512) + 3 * 2 * 16)
})
