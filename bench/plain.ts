import { InferenceSession, Tensor } from 'onnxruntime-node'
import { Graph } from '../kernels/graph/graph.js'
import { NAMED_COEFFICIENTS } from '../kernels/orthogonalize/coefficients.js'
import { noise } from './trainer.js'

/**
 * Newton-Schulz as one writes it down first: plain float32 matrix products and elementwise sums in onnxruntime-node's
 * public API, tensors on the host. Started by bench.ts with the list of matrices; takes one step per message.
 */
const matrices: (readonly [number, number])[] = JSON.parse(process.argv[2])
const NS_STEPS = 5

const options = {
  executionProviders: ['cpu'],
  logSeverityLevel: 3,
  // Threads that spin while they wait would count as CPU seconds.
  extra: { session: { intra_op: { allow_spinning: '0' } } },
} as const
const wide = await InferenceSession.create(model(false), options)
const tall = await InferenceSession.create(model(true), options)
const values = noise(Math.max(...matrices.map(([rows, cols]) => rows * cols)))
for (const session of [wide, tall])
  await session.run({ u: new Tensor('float32', values.subarray(0, 64 * 64), [64, 64]) })

process.on('message', async () => {
  for (const [rows, cols] of matrices) {
    const u = new Tensor('float32', values.subarray(0, rows * cols), [rows, cols])
    await (rows > cols ? tall : wide).run({ u })
  }
  process.send?.('done')
})
process.send?.('ready')

/** X = u/‖u‖; A = XXᵀ; X <- aX + (bA + cA²)X. A tall matrix is transposed before and after. */
function model(transposed: boolean): Uint8Array {
  const graph = new Graph('plain')
  const u = graph.input('u', 'float32', ['rows', 'cols'])
  const flip = (value: string) => graph.node('Transpose', [value])
  const norm = graph.node('Sqrt', [graph.reduce('ReduceSum', graph.mul(u, u))])
  let x = graph.div(transposed ? flip(u) : u, norm)
  const [a, b, c] = NAMED_COEFFICIENTS.keller_jordan.coefficients[0].map((value) => graph.constant(value))
  const product = (left: string, right: string) => graph.node('MatMul', [left, right])
  for (let step = 0; step < NS_STEPS; step++) {
    const gram = product(x, flip(x))
    const polynomial = graph.add(graph.mul(gram, b), graph.mul(product(gram, gram), c))
    x = graph.add(graph.mul(x, a), product(polynomial, x))
  }
  graph.output('data', transposed ? flip(x) : x, { dims: ['rows', 'cols'] })
  return graph.bytes()
}
