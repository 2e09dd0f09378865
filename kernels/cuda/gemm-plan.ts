import { GEMM_MODES, GEMM_TILE } from './gemm.js'

/** A float16 matrix, row-major; `map` is the device address of its tensor map. */
export type GemmMatrix = { readonly rows: number; readonly cols: number; readonly map: bigint }

/**
 * D = alpha·AB + Σ factor·addend, and of a symmetric D + diagonal·I; of that the part on and below the diagonal is
 * computed, then mirrored.
 */
export type GemmProblem = {
  readonly mode: keyof typeof GEMM_MODES
  readonly a: GemmMatrix
  readonly b: GemmMatrix
  readonly d: GemmMatrix
  /** The number of products in one sum. */
  readonly depth: number
  readonly symmetric: boolean
  readonly alpha: number
  /** At most two. */
  readonly addends: readonly GemmAddend[]
  readonly diagonal: number
}

export type GemmAddend = { readonly matrix: GemmMatrix; readonly factor: number }

type Factors = Pick<GemmProblem, 'alpha' | 'addends'>

/** A launch as the kernel reads it: the bytes of its problems and tiles, with `rounds` tiles for each of `clusters`. */
export type GemmPlan = {
  readonly problems: Uint8Array
  readonly tiles: Uint8Array
  readonly clusters: number
  readonly rounds: number
}

// Tensor maps describe a matrix, and its Gram matrix, whose every row starts on a multiple of 16 bytes.
const GEMM_MULTIPLE = 8

/** The shape of a matrix with as many zeros added as products need; they add only singular values that are 0. */
export function paddedShape({ rows, cols }: { rows: number; cols: number }): { rows: number; cols: number } {
  const [height, width] = [rows, cols].map((side) => Math.ceil(side / GEMM_MULTIPLE) * GEMM_MULTIPLE)
  return { rows: height, cols: width }
}

/** Whether products need zeros added to a matrix. */
export function isPadded({ rows, cols }: { rows: number; cols: number }): boolean {
  return rows % GEMM_MULTIPLE > 0 || cols % GEMM_MULTIPLE > 0
}

const isTall = (x: GemmMatrix) => x.rows > x.cols

/** D = alpha·XXᵀ, or alpha·XᵀX of a tall X. */
export function gramProblem(x: GemmMatrix, d: GemmMatrix, alpha: number): GemmProblem {
  const mode = isTall(x) ? 'across' : 'along'
  return { mode, a: x, b: x, d, depth: Math.max(x.rows, x.cols), symmetric: true, alpha, addends: [], diagonal: 0 }
}

/** D = alpha·ST + addends + diagonal·I, all symmetric; S and T commute. */
export function productProblem(
  [s, t]: readonly [GemmMatrix, GemmMatrix],
  d: GemmMatrix,
  { alpha, addends, diagonal = 0 }: Factors & { diagonal?: number },
): GemmProblem {
  return { mode: 'along', a: s, b: t, d, depth: s.cols, symmetric: true, alpha, addends, diagonal }
}

/** D = alpha·WX + addends for a symmetric W, or alpha·XW + addends with a tall X. */
export function applyProblem(
  [w, x]: readonly [GemmMatrix, GemmMatrix],
  d: GemmMatrix,
  { alpha, addends }: Factors,
): GemmProblem {
  const operands = isTall(x) ? ({ mode: 'along', a: x, b: w } as const) : ({ mode: 'b_across', a: w, b: x } as const)
  return { ...operands, d, depth: w.cols, symmetric: false, alpha, addends, diagonal: 0 }
}

const PROBLEM_BYTES = 56
const TILE_BYTES = 16
const NONE = 0xffffffff
// The time of a tile beside its sums, counted in slices of k.
const TILE_COST = 4
// Tiles are dealt in bands of this many rows: those that run at a time then share rows and columns in the cache.
const BAND = 8

type Tile = { problem: number; row: number; col: number }
type Deal = { readonly lists: readonly (readonly Tile[])[]; readonly span: number }

/**
 * Deals the tiles of all problems to at most so many clusters: to the fewest that end as early as all of them would. A
 * cluster without a tile would only keep others waiting: those of other lanes, and the end of the launch.
 */
export function planGemm(problems: readonly GemmProblem[], clusters: number): GemmPlan {
  const tiles = tilesLongestFirst(problems)
  const work = tiles.reduce((sum, { problem }) => sum + costOf(problems[problem]), 0)
  const costs = problems.map(costOf)
  let best = deal(tiles, costs, clusters)
  const { span } = best
  for (let low = Math.ceil(work / span); low < best.lists.length; ) {
    const middle = Math.floor((low + best.lists.length) / 2)
    const fewer = deal(tiles, costs, middle)
    if (fewer.span <= span) best = fewer
    else low = middle + 1
  }
  const rounds = Math.max(...best.lists.map((list) => list.length))
  const bytes = tileBytes(problems, best.lists, rounds)
  return { problems: problemBytes(problems), tiles: bytes, clusters: best.lists.length, rounds }
}

/** The number of tiles of problems, and the time of the longest of them. */
export function tileWork(problems: readonly GemmProblem[]): { tiles: number; cost: number } {
  const tiles = problems.reduce((sum, problem) => sum + tilesOf(problem).length, 0)
  return { tiles, cost: Math.max(...problems.map(costOf)) }
}

/** Each tile goes to the cluster that is free first. */
function deal(tiles: readonly Tile[], costs: readonly number[], clusters: number): Deal {
  const loads = new Array<number>(clusters).fill(0)
  const lists = loads.map((): Tile[] => [])
  for (const tile of tiles) {
    let free = 0
    for (let i = 1; i < clusters; i++) if (loads[i] < loads[free]) free = i
    loads[free] += costs[tile.problem]
    lists[free].push(tile)
  }
  return { lists, span: Math.max(...loads) }
}

function tilesLongestFirst(problems: readonly GemmProblem[]): Tile[] {
  const longestFirst = [...problems.keys()].sort((i, j) => slices(problems[j]) - slices(problems[i]))
  return longestFirst.flatMap((problem) => tilesOf(problems[problem]).map((place) => ({ problem, ...place })))
}

/** The time of one of a problem's tiles, counted in slices of k. */
const costOf = (problem: GemmProblem) => slices(problem) + TILE_COST
const slices = ({ depth }: GemmProblem) => Math.ceil(depth / GEMM_TILE.depth)

// Tiles are square: of a symmetric D only those on and below the diagonal of tiles touch the lower half.
function tilesOf({ d, symmetric }: GemmProblem): { row: number; col: number }[] {
  const rows = Math.ceil(d.rows / GEMM_TILE.rows)
  const cols = Math.ceil(d.cols / GEMM_TILE.cols)
  const all = Array.from({ length: rows * cols }, (_, index) => {
    const first = Math.floor(index / (BAND * cols)) * BAND
    const height = Math.min(BAND, rows - first)
    const within = index - first * cols
    return { row: first + (within % height), col: Math.floor(within / height) }
  })
  return symmetric ? all.filter(({ row, col }) => col <= row) : all
}

// As `struct Problem` in gemm.cu.
function problemBytes(problems: readonly GemmProblem[]): Uint8Array {
  const view = new DataView(new ArrayBuffer(problems.length * PROBLEM_BYTES))
  for (const [index, { a, b, d, alpha, addends, diagonal }] of problems.entries()) {
    const at = index * PROBLEM_BYTES
    // The kernel writes D over the addend that it reads last, its C; a first one of two is its E.
    const [c, e] = addends.toReversed()
    for (const [i, matrix] of [a, b, d, c?.matrix, e?.matrix].entries()) {
      view.setBigUint64(at + i * 8, matrix?.map ?? 0n, true)
    }
    for (const [i, factor] of [alpha, c?.factor, e?.factor, diagonal].entries())
      view.setFloat32(at + 40 + i * 4, factor ?? 0, true)
  }
  return new Uint8Array(view.buffer)
}

// As `struct Tile` in gemm.cu, round by round, one tile for each cluster.
function tileBytes(problems: readonly GemmProblem[], lists: readonly (readonly Tile[])[], rounds: number): Uint8Array {
  const view = new DataView(new ArrayBuffer(rounds * lists.length * TILE_BYTES))
  for (let index = 0; index < rounds * lists.length; index++) {
    const at = index * TILE_BYTES
    const tile = lists[index % lists.length][Math.floor(index / lists.length)]
    view.setUint32(at, tile?.problem ?? NONE, true)
    if (tile === undefined) continue
    const problem = problems[tile.problem]
    view.setUint16(at + 4, tile.row, true)
    view.setUint16(at + 6, tile.col, true)
    view.setUint32(at + 8, slices(problem), true)
    view.setUint8(at + 12, GEMM_MODES[problem.mode])
    view.setUint8(at + 13, problem.symmetric ? 1 : 0)
    view.setUint8(at + 14, problem.addends.length)
  }
  return new Uint8Array(view.buffer)
}
