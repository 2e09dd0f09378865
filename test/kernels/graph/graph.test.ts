import fc from 'fast-check'
import { Tensor } from 'onnxruntime-node'
import t from 'tap'
import { type Attributes, Graph } from '../../../kernels/graph/graph.js'
import { gaussian, multiply, relativeDistance, transpose } from '../../reference.js'
import { float32, openSession, values } from '../session.js'

async function evaluate(graph: Graph, feeds: Record<string, Tensor>): Promise<Record<string, number[]>> {
  const session = await openSession(graph.bytes())
  const results = await session.run(feeds)
  return Object.fromEntries(Object.entries(results).map(([name, tensor]) => [name, [...values(tensor)]]))
}

t.test('elementwise methods are the operators they are named after', async (t) => {
  const graph = new Graph('elementwise')
  const a = graph.input('a', 'float32', ['n'])
  const b = graph.input('b', 'float32', ['n'])
  graph.output('sum', graph.add(a, b), { dims: ['n'] })
  graph.output('difference', graph.sub(a, b), { dims: ['n'] })
  graph.output('product', graph.mul(a, b), { dims: ['n'] })
  graph.output('quotient', graph.div(a, b), { dims: ['n'] })
  graph.output('scaled', graph.mul(a, graph.constant(-2)), { dims: ['n'] })
  t.same(await evaluate(graph, { a: float32([1, 6], [2]), b: float32([4, 3], [2]) }), {
    sum: [5, 9],
    difference: [-3, 3],
    product: [4, 18],
    quotient: [0.25, 2],
    scaled: [-2, -12],
  })
})

t.test('gemm is alpha·op(A)·op(B) + beta·C', async (t) => {
  const [a, b, c] = [gaussian(1, 6), gaussian(2, 6), gaussian(3, 4)]
  for (const [transA, transB] of [
    [false, false],
    [true, false],
    [false, true],
    [true, true],
  ]) {
    const [dimsA, dimsB] = [transA ? [3, 2] : [2, 3], transB ? [2, 3] : [3, 2]]
    const graph = new Graph('gemm')
    const [nodeA, nodeB] = [graph.input('a', 'float32', dimsA), graph.input('b', 'float32', dimsB)]
    const nodeC = graph.input('c', 'float32', [2, 2])
    graph.output('plain', graph.gemm(nodeA, nodeB, { transA, transB }))
    graph.output('full', graph.gemm(nodeA, nodeB, { transA, transB, c: nodeC, alpha: -1.5, beta: 0.25 }))
    const results = await evaluate(graph, { a: float32(a, dimsA), b: float32(b, dimsB), c: float32(c, [2, 2]) })

    const left = transA ? transpose({ rows: 3, cols: 2, data: a }) : { rows: 2, cols: 3, data: a }
    const right = transB ? transpose({ rows: 2, cols: 3, data: b }) : { rows: 3, cols: 2, data: b }
    const product = multiply(left, right).data
    t.ok(relativeDistance(results.plain, product) < 1e-6)
    t.ok(
      relativeDistance(
        results.full,
        product.map((value, i) => -1.5 * value + 0.25 * c[i]),
      ) < 1e-6,
    )
  }
})

t.test('reduce goes over all elements or the given axes', async (t) => {
  const graph = new Graph('reduce')
  const x = graph.input('x', 'float32', ['m', 'n'])
  graph.output('all', graph.reduce('ReduceSum', x), { dims: [] })
  graph.output('rows', graph.reduce('ReduceMax', x, { axes: [-1] }), { dims: ['m'] })
  graph.output('columns', graph.reduce('ReduceMean', x, { axes: [0], keepdims: true }), { dims: [1, 'n'] })
  t.same(await evaluate(graph, { x: float32([1, 2, 3, 5], [2, 2]) }), { all: [11], rows: [2, 5], columns: [2, 3.5] })
})

t.test('constants, several results, optional inputs, every kind of attribute and a contrib operator', async (t) => {
  const graph = new Graph('general')
  const x = graph.input('x', 'float32', [2, 2])
  const [top, bottom] = graph.nodeWithOutputs('Split', [x, graph.ints([1, 1])], {
    count: 2,
    attributes: { axis: { int: 0 } },
  })
  graph.output('bottom', bottom)
  graph.output('top', top)
  const [values, indices] = graph.nodeWithOutputs('TopK', [x, graph.ints([1])], { count: 2 })
  graph.output('largest', graph.add(values, graph.cast(indices, 'float32')))
  graph.output('transposed', graph.node('Transpose', [x], { perm: { ints: [1, 0] } }))
  graph.output('gelu', graph.node('Gelu', [graph.constant(0)], { approximate: { string: 'tanh' } }))
  graph.output('clipped', graph.node('Clip', [x, '', graph.constant(2)]))
  graph.output('moved', graph.add(x, graph.floats([10, 20], [1, 2])))
  const attributes: Attributes = { alpha: { float: 0.5 }, transB: { int: 1 } }
  graph.output('gram', graph.node('com.microsoft.FusedMatMul', [x, x], attributes))
  t.same(await evaluate(graph, { x: float32([1, 2, 3, 4], [2, 2]) }), {
    bottom: [3, 4],
    top: [1, 2],
    largest: [3, 5],
    transposed: [1, 3, 2, 4],
    gelu: [0],
    clipped: [1, 2, 2, 2],
    moved: [11, 22, 13, 24],
    gram: [2.5, 5.5, 5.5, 12.5],
  })
})

t.test('an input, a constant and a result may each be an output, a result twice', async (t) => {
  const graph = new Graph('outputs')
  const x = graph.input('x', 'float32', [1])
  const y = graph.add(x, graph.constant(1))
  graph.output('input', x)
  graph.output('constant', graph.floats([7], [1]))
  graph.output('once', y)
  graph.output('twice', y)
  graph.output('later', graph.mul(y, y))
  t.same(await evaluate(graph, { x: float32([2], [1]) }), {
    input: [2],
    constant: [7],
    once: [3],
    twice: [3],
    later: [9],
  })
})

t.test('int64 inputs and outputs keep negative and large values', async (t) => {
  const graph = new Graph('integers')
  const x = graph.input('x', 'int64', ['n'])
  graph.output('y', graph.add(x, graph.ints([-1])), { dtype: 'int64', dims: ['n'] })
  const session = await openSession(graph.bytes())
  const { y } = await session.run({ x: new Tensor('int64', [0n, 2n ** 53n], [2]) })
  t.same([...y.data], [-1n, 2n ** 53n - 1n])
})

t.test('two values of one name are refused', async (t) => {
  const graph = new Graph('twice')
  const x = graph.input('x', 'float32', [1])
  t.throws(() => graph.input('x', 'float32', [2]), { message: "graph 'twice' already has a value named 'x'" })
  t.throws(() => graph.output('x', graph.add(x, x)), { message: "graph 'twice' already has a value named 'x'" })
})

/** The float32 of the given bits, and the bits of a float32. */
const toFloat = (bits: number) => new Float32Array(Uint32Array.of(bits).buffer)[0]
const toBits = (value: number) => new Uint32Array(Float32Array.of(value).buffer)[0]

/** Nearest multiple of 2⁻²⁴⁺ᵉ with ties to even: float16 has 11 significant bits and 2⁻²⁴ as its smallest number. */
function roundToFloat16(value: number): number {
  const exponent = Math.max(Math.floor(Math.log2(Math.abs(value))), -14)
  const ulp = 2 ** (exponent - 10)
  const down = Math.floor(value / ulp)
  const rest = value / ulp - down
  const rounded = (rest > 0.5 || (rest === 0.5 && down % 2 !== 0) ? down + 1 : down) * ulp
  return Math.abs(rounded) >= 65536 ? Math.sign(rounded) * Number.POSITIVE_INFINITY : rounded
}

function roundToBfloat16(value: number): number {
  const bits = toBits(value)
  return toFloat((bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000)
}

t.test('cast to bfloat16 and float16 rounds to nearest, ties to even, subnormals included', async (t) => {
  const graph = new Graph('cast')
  const x = graph.input('x', 'float32', ['n'])
  graph.output('bfloat16', graph.cast(graph.cast(x, 'bfloat16'), 'float32'), { dims: ['n'] })
  graph.output('float16', graph.cast(graph.cast(x, 'float16'), 'float32'), { dims: ['n'] })
  const session = await openSession(graph.bytes())
  const finite = fc.integer({ min: 0, max: 0xffffffff }).map(toFloat).filter(Number.isFinite)
  const float16Range = fc.float({ min: -70000, max: 70000, noNaN: true })
  const tie = fc.integer({ min: -4096, max: 4096 }).map((value) => (2 * value + 1) / 2 ** 13)
  const lists = fc.array(fc.oneof(finite, float16Range, tie), { minLength: 1, maxLength: 200 })
  await fc.assert(
    fc.asyncProperty(lists, async (list) => {
      const results = await session.run({ x: float32(list, [list.length]) })
      t.same([...values(results.bfloat16)], list.map(roundToBfloat16))
      t.same(
        [...values(results.float16)],
        list.map((value) => (value === 0 ? 0 : roundToFloat16(value))),
      )
    }),
    { numRuns: 100, seed: 5 },
  )
})
