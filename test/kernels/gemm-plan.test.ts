import t from 'tap'
import { GEMM_MODES, GEMM_TILE } from '../../kernels/cuda/gemm.js'
import {
  applyProblem,
  type GemmMatrix,
  type GemmProblem,
  gramProblem,
  isPadded,
  paddedShape,
  planGemm,
  productProblem,
} from '../../kernels/cuda/gemm-plan.js'

const matrix = (rows: number, cols: number, map = 1n): GemmMatrix => ({ rows, cols, map })
const plain = { alpha: 1, addends: [] } as const

type Dealt = {
  cluster: number
  problem: number
  row: number
  col: number
  slices: number
  mode: number
  symmetric: number
  addends: number
}

function dealt(problems: readonly GemmProblem[], clusters: number): Dealt[] {
  const { tiles, rounds, clusters: used } = planGemm(problems, clusters)
  const view = new DataView(tiles.buffer)
  t.ok(used <= clusters)
  t.equal(tiles.length, rounds * used * 16)
  const all = Array.from({ length: rounds * used }, (_, index) => {
    const at = index * 16
    const [problem, slices] = [view.getUint32(at, true), view.getUint32(at + 8, true)]
    const [row, col] = [view.getUint16(at + 4, true), view.getUint16(at + 6, true)]
    const [mode, symmetric, addends] = [view.getUint8(at + 12), view.getUint8(at + 13), view.getUint8(at + 14)]
    return { cluster: index % used, problem, row, col, slices, mode, symmetric, addends }
  })
  return all.filter(({ problem }) => problem !== 0xffffffff)
}

const places = (tiles: readonly Dealt[], problem: number) =>
  tiles
    .filter((tile) => tile.problem === problem)
    .map(({ row, col }) => `${row},${col}`)
    .sort()

t.test('every tile of a product is dealt once, of a symmetric one those on and below the diagonal', async (t) => {
  const x = matrix(700, 5000)
  const w = matrix(700, 700)
  const tiles = dealt(
    [
      applyProblem([w, x], x, plain),
      gramProblem(x, w, 1),
      applyProblem([matrix(8, 8), matrix(2312, 8)], matrix(2312, 8), plain),
    ],
    7,
  )
  const grid = (rows: number, cols: number) =>
    Array.from({ length: rows * cols }, (_, i) => [Math.floor(i / cols), i % cols])
  t.same(places(tiles, 0), grid(3, 20).map(String).sort())
  t.same(
    places(tiles, 1),
    grid(3, 3)
      .filter(([row = 0, col = 0]) => col <= row)
      .map(String)
      .sort(),
  )
  t.same(places(tiles, 2), grid(10, 1).map(String).sort())
})

t.test('a launch takes at most one tile of the costliest kind longer than its work shared evenly', async (t) => {
  const shapes = [
    [768, 3072],
    [2304, 768],
    [768, 768],
    [512, 2048],
  ] as const
  const problems = shapes.flatMap(([rows, cols]) => {
    const m = Math.min(rows, cols)
    return Array.from({ length: 12 }, () => gramProblem(matrix(rows, cols), matrix(m, m), 1))
  })
  const loads = new Array<number>(66).fill(0)
  for (const { cluster, slices } of dealt(problems, 66)) loads[cluster] += slices + 4
  const even = loads.reduce((sum, load) => sum + load, 0) / loads.length
  t.ok(Math.max(...loads) - even <= 3072 / GEMM_TILE.depth + 4)
})

t.test('a launch has the fewest clusters with which it ends as early as with all', async (t) => {
  const [small, large] = [matrix(768, 768), matrix(2048, 2048)]
  const used = (problems: readonly GemmProblem[]) => planGemm(problems, 66).clusters
  t.equal(used([gramProblem(small, small, 1)]), 6, 'one for each tile of a small product')
  const many = Array.from({ length: 4 }, () => gramProblem(large, large, 1))
  t.equal(used(many), 48, '144 tiles take three rounds, of 48 clusters as of 66')
  t.equal(used([...many, ...many.slice(1)]), 63, '252 take four')
  t.equal(used(Array.from({ length: 11 }, () => gramProblem(large, large, 1))), 66, '396 take six rounds of all')
  t.equal(used([gramProblem(matrix(2048, 8192), large, 1), gramProblem(small, small, 1)]), 37, 'short sums share one')
})

t.test('a tile says how its operands lie, whatever the matrix shape', async (t) => {
  const [wide, tall, w] = [matrix(64, 1000), matrix(1000, 64), matrix(64, 64)]
  const addends = [{ matrix: w, factor: 1 }]
  const problems = [
    gramProblem(wide, w, 1),
    gramProblem(tall, w, 1),
    applyProblem([w, wide], wide, plain),
    applyProblem([w, tall], tall, plain),
    productProblem([w, w], w, { alpha: 1, addends }),
  ]
  const first = problems.map((_, index) => dealt(problems, 3).find(({ problem }) => problem === index))
  t.same(
    first.map((tile) => tile?.mode),
    [GEMM_MODES.along, GEMM_MODES.across, GEMM_MODES.b_across, GEMM_MODES.along, GEMM_MODES.along],
  )
  t.same(
    first.map((tile) => tile?.slices),
    [16, 16, 1, 1, 1],
  )
  t.same(
    first.map((tile) => tile?.symmetric),
    [1, 1, 0, 0, 1],
  )
  t.same(
    first.map((tile) => tile?.addends),
    [0, 0, 0, 0, 1],
  )
})

t.test('a problem holds its maps in the order A, B, D, C, E and its factors as float32', async (t) => {
  const [s, u, d, c, e] = [2n, 3n, 5n, 7n, 11n].map((map) => matrix(64, 64, map)) as [
    GemmMatrix,
    GemmMatrix,
    GemmMatrix,
    GemmMatrix,
    GemmMatrix,
  ]
  const two = productProblem([s, u], d, {
    alpha: 0.5,
    addends: [
      { matrix: e, factor: 0.25 },
      { matrix: c, factor: -4.775 },
    ],
    diagonal: 0.75,
  })
  const { problems, rounds } = planGemm([two, gramProblem(s, d, 3)], 66)
  const view = new DataView(problems.buffer)
  const maps = (at: number) => [0, 8, 16, 24, 32].map((i) => view.getBigUint64(at + i, true))
  const factors = (at: number) => [40, 44, 48, 52].map((i) => view.getFloat32(at + i, true))
  t.equal(rounds, 1)
  t.equal(problems.length, 112)
  t.same(maps(0), [2n, 3n, 5n, 7n, 11n])
  t.same(factors(0), [0.5, Math.fround(-4.775), 0.25, 0.75])
  t.same(maps(56), [2n, 2n, 5n, 0n, 0n])
  t.same(factors(56), [3, 0, 0, 0])
})

t.test('zeros are added until all rows of a matrix and of its Gram matrix start on 16 bytes', async (t) => {
  for (const [rows, cols, height, width] of [
    [768, 3072, 768, 3072],
    [73, 80, 80, 80],
    [80, 73, 80, 80],
    [65, 1001, 72, 1008],
  ] as const) {
    t.same(paddedShape({ rows, cols }), { rows: height, cols: width })
    t.equal(isPadded({ rows, cols }), rows !== height || cols !== width)
  }
})
