import { Tensor } from 'onnxruntime-node'
import t from 'tap'
import { Graph } from '../../../kernels/graph/graph.js'
import { expandCoefficients, NAMED_COEFFICIENTS } from '../../../kernels/orthogonalize/coefficients.js'
import { plainIterations } from '../../../kernels/orthogonalize/exact-scalars.js'
import { newtonSchulz } from '../../../kernels/orthogonalize/newton-schulz.js'
import { buildOrthogonalize } from '../../../kernels/orthogonalize/orthogonalize.js'
import { composed, frobenius, gaussian } from '../../reference.js'
import { float32, loadKernel, openSession, values } from '../session.js'

const SETS = Object.entries(NAMED_COEFFICIENTS).map(([name, { coefficients, ns_steps }]) => ({
  name,
  triples: expandCoefficients(coefficients, ns_steps),
}))
type Triples = (typeof SETS)[number]['triples']
// Rounding of the norm in half precision can lift a singular value to 1.02.
const LARGEST = 1.02
const BOUND = 1.5
const SIGMAS = Array.from({ length: 51 }, (_, i) => (LARGEST * (i + 1)) / 51)

/** The iterations alone: what goes in is not normalized. */
async function iterate(triples: Triples, tall: boolean) {
  const graph = new Graph('iterations')
  const dims = ['rows', 'cols']
  const x = graph.input('x', 'float32', dims)
  graph.output('o', newtonSchulz(graph, x, { iterations: plainIterations(triples), tall }), { dims })
  const session = await openSession(graph.bytes())
  return async (data: ArrayLike<number>, shape: readonly number[]) =>
    values((await session.run({ x: float32(data, shape) })).o!)
}

const unit = (seed: number, count: number) => {
  const vector = gaussian(seed, count)
  return vector.map((x) => x / frobenius(vector))
}
const outer = (u: Float64Array, v: Float64Array) =>
  Float64Array.from({ length: u.length * v.length }, (_, i) => u[Math.floor(i / v.length)]! * v[i % v.length]!)
const dot = (a: ArrayLike<number>, b: Float64Array) => b.reduce((sum, x, i) => sum + x * a[i]!, 0)

for (const { name, triples } of SETS) {
  t.test(`${name} is positive and below 1.5 on (0, 1.02]`, async (t) => {
    for (let i = 1; i <= 20_000; i++) {
      for (const sigma of [(LARGEST * i) / 20_000, LARGEST * 10 ** (-i / 1000)]) {
        const result = composed(triples, sigma)
        if (!(result > 0 && result < BOUND)) t.fail(`${sigma} becomes ${result}`)
      }
    }
    t.ok(composed(triples, LARGEST) > 0.5, 'and not small where singular values are large')
  })

  t.test(`${name}: the kernel does that to every singular value of a matrix`, async (t) => {
    for (const tall of [false, true]) {
      const run = await iterate(triples, tall)
      const size = SIGMAS.length
      const diagonal = Float64Array.from({ length: size * size }, (_, i) =>
        i % (size + 1) === 0 ? SIGMAS[i / (size + 1)]! : 0,
      )
      const result = await run(diagonal, [size, size])
      for (const [i, sigma] of SIGMAS.entries()) {
        const value = result[i * (size + 1)]!
        t.ok(value > 0 && value < BOUND, `${sigma} becomes ${value}`)
        t.ok(Math.abs(value / composed(triples, sigma) - 1) < 1e-5)
      }
    }
  })

  t.test(`${name}: a rank-1 matrix keeps its sign and its bound, also with a norm of 1.02`, async (t) => {
    for (const [rows, cols] of [
      [20, 36],
      [36, 20],
      [1, 40],
      [40, 1],
    ] as const) {
      const run = await iterate(triples, rows > cols)
      const direction = outer(unit(1, rows), unit(2, cols))
      for (const sigma of [1e-3, 0.1, 0.5, 0.98, 1, 1.01, LARGEST]) {
        const gain = dot(
          await run(
            direction.map((x) => x * sigma),
            [rows, cols],
          ),
          direction,
        )
        t.ok(gain > 0 && gain < BOUND, `${rows}x${cols}, ${sigma}: gain ${gain}`)
        t.ok(Math.abs(gain / composed(triples, sigma) - 1) < 1e-4, `${gain} is ${composed(triples, sigma)}`)
      }
    }
  })

  t.test(`${name}: the whole kernel on rank-1 gradients of any scale`, async (t) => {
    const scalars = { gradient_scale: 1, c_m: 0, c_g: 1, n_m: 1, n_g: 0, eps: 1e-7, output_scale: 1 }
    for (const [rows, cols] of [
      [16, 24],
      [24, 16],
      [16, 16],
    ] as const) {
      const tall = rows > cols
      const run = await loadKernel({ kind: 'muon', coefficients: triples, tall, ...FLOAT32 })
      const one = new Float64Array(rows * cols)
      one[cols + 1] = -1
      const gradients = [outer(unit(3, rows), unit(4, cols)), one, one.map(() => 1 / Math.sqrt(rows * cols))]
      for (const direction of gradients) {
        for (const scale of [1e-30, 1, 1e30]) {
          const gradient = direction.map((x) => x * scale)
          const { data } = await run({ dims: [rows, cols], gradient, scalars })
          const gain = dot(data!, direction)
          t.ok(Math.abs(gain - composed(triples, 1)) < 1e-3, `scale ${scale}: gain ${gain}`)
        }
      }
    }
  })

  t.test(`${name}: in float16, where rounding fills the null space, the direction keeps sign and bound`, async (t) => {
    const [rows, cols] = [20, 48]
    const direction = outer(unit(5, rows), unit(6, cols))
    for (const form of ['direct', 'gram'] as const) {
      const { model, input_scale, output_scale } = buildOrthogonalize({ coefficients: triples, tall: false, form })
      const session = await openSession(model)
      for (const sigma of [0.98, 1, LARGEST]) {
        const x = float32(
          direction.map((value) => value * sigma * input_scale),
          [rows, cols],
        )
        const half = (await toFloat16.run({ x })).half!
        const { o } = await session.run({ x: new Tensor('float16', half.data as Uint16Array, [rows, cols]) })
        const result = values((await toFloat32.run({ half: o! })).x!).map((value) => value * output_scale)
        const gain = dot(result, direction)
        t.ok(gain > 0 && gain < BOUND, `${form}, ${sigma}: gain ${gain}`)
        t.ok(frobenius(result) < BOUND * Math.sqrt(rows), 'and nothing explodes')
      }
    }
  })
}

const FLOAT32 = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
const DIMS = ['rows', 'cols']
const narrow = new Graph('narrow')
narrow.output('half', narrow.cast(narrow.input('x', 'float32', DIMS), 'float16'), { dtype: 'float16', dims: DIMS })
const widen = new Graph('widen')
widen.output('x', widen.cast(widen.input('half', 'float16', DIMS), 'float32'), { dims: DIMS })
const [toFloat16, toFloat32] = await Promise.all([openSession(narrow.bytes()), openSession(widen.bytes())])
