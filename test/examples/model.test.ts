import t from 'tap'
import { loadModel, type Size, weightsOf } from '../../examples/model.js'
import { initialWeights, type Tensors } from '../../examples/network.js'
import { type Examples, examplesAt, fixedPositions, seededRandom } from '../../examples/text.js'

const SIZE: Size = { context: 5, embedding: 3, hidden: 12 }
const BATCH = 7
const model = await loadModel(SIZE, BATCH)
const TEXT = Buffer.from('One byte after another, and every one of them is a guess. '.repeat(4))

function weightsAndExamples(count = BATCH): { weights: Tensors; examples: Examples } {
  const positions = fixedPositions(TEXT, { count, context: SIZE.context })
  return {
    weights: initialWeights(weightsOf(SIZE), seededRandom(7)),
    examples: examplesAt(TEXT, positions, SIZE.context),
  }
}

/** The model once more in float64 and plain loops, written to be read beside the formulas in examples/model.ts. */
function referenceLoss(weights: Record<string, Float64Array>, { tokens, targets }: Examples): number {
  let loss = 0
  for (let i = 0; i < targets.length; i++) {
    const context = [...tokens.subarray(i * SIZE.context, (i + 1) * SIZE.context)].map(Number)
    const x = context.flatMap((token) => [...weights.embedding.subarray(token * 3, token * 3 + 3)])
    let h = times(weights.w1, x).map(relu)
    for (const name of ['w2', 'w3']) {
      const y = times(weights[name], h).map(relu)
      h = h.map((value, k) => value + y[k])
    }
    const logits = times(weights.head, h)
    const normalizer = Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit), 0))
    loss += (normalizer - logits[Number(targets[i])]) / targets.length
  }
  return loss
}

function times(matrix: Float64Array, vector: number[]): number[] {
  return Array.from({ length: matrix.length / vector.length }, (_, row) =>
    vector.reduce((sum, value, column) => sum + value * matrix[row * vector.length + column], 0),
  )
}

function relu(value: number): number {
  return Math.max(0, value)
}

function inFloat64(weights: Tensors): Record<string, Float64Array> {
  return Object.fromEntries(Object.entries(weights).map(([name, values]) => [name, Float64Array.from(values)]))
}

t.test('the loss is that of the formulas in float64', async (t) => {
  const { weights, examples } = weightsAndExamples()
  const { loss } = await model.gradients(weights, examples)
  const expected = referenceLoss(inFloat64(weights), examples)
  t.ok(Math.abs(loss / expected - 1) < 1e-6, `${loss}, expected ${expected}`)
})

for (const { name } of weightsOf(SIZE)) {
  t.test(`the gradient of ${name} is the central difference of the float64 loss`, async (t) => {
    const { weights, examples } = weightsAndExamples()
    const model = await loadModel(SIZE, BATCH)
    const gradient = (await model.gradients(weights, examples)).gradients[name]
    const expected = centralDifferences(inFloat64(weights), examples, name)
    t.equal(gradient.length, expected.length)
    const distance = Math.hypot(...expected.map((value, i) => value - gradient[i])) / Math.hypot(...expected)
    t.ok(distance < 1e-5, `relative distance ${distance}`)
  })
}

function centralDifferences(weights: Record<string, Float64Array>, examples: Examples, name: string): number[] {
  const step = 1e-6
  const values = weights[name]
  const lossAt = (i: number, value: number) => {
    const saved = values[i]
    values[i] = value
    const loss = referenceLoss(weights, examples)
    values[i] = saved
    return loss
  }
  return Array.from(values, (value, i) => (lossAt(i, value + step) - lossAt(i, value - step)) / (2 * step))
}

t.test('the loss over several batches is the mean of theirs', async (t) => {
  const { weights, examples } = weightsAndExamples(3 * BATCH)
  const expected = referenceLoss(inFloat64(weights), examples)
  const loss = await model.loss(weights, examples)
  t.ok(Math.abs(loss / expected - 1) < 1e-6, `${loss}, expected ${expected}`)
})

t.test('the same weights and examples give the same bits', async (t) => {
  const { weights, examples } = weightsAndExamples()
  t.same(await model.gradients(weights, examples), await model.gradients(weights, examples))
})

t.test('a missing weight is an error', async (t) => {
  const { weights, examples } = weightsAndExamples()
  await t.rejects(model.gradients({ ...weights, w2: new Float32Array(3) }, examples), /size/)
})

t.test('the same seed gives the same weights, of the stated deviations', (t) => {
  const weights = initialWeights(weightsOf(SIZE), seededRandom(3))
  t.same(weights, initialWeights(weightsOf(SIZE), seededRandom(3)))
  t.notSame(weights, initialWeights(weightsOf(SIZE), seededRandom(4)))
  const rms = (values: Float32Array) => Math.sqrt(values.reduce((sum, value) => sum + value ** 2, 0) / values.length)
  t.ok(Math.abs(rms(weights.embedding) - 1) < 0.1)
  t.ok(Math.abs(rms(weights.head) * 12 ** 0.5 - 1) < 0.1)
  t.end()
})
