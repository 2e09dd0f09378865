import { VECTOR } from '../../../kernels/cuda/entry-points.js'
import { MAX_BLOCKS, PARTIAL_BYTES, THREADS } from '../../../kernels/cuda/source.js'
import type { KernelSpec } from '../../../kernels/kernel.js'
import type { Plan, Task } from '../../optimizer/plan.js'

export type MuonSpec = Extract<KernelSpec, { kind: 'muon' }>

/**
 * `count` matrices of one shape that lie one behind the other. A range of elements of an elementwise algorithm is one
 * matrix with a single column.
 */
export type Stack<Spec extends KernelSpec = KernelSpec> = {
  readonly spec: Spec
  readonly rows: number
  readonly cols: number
  /** Elements of the tensor before the first matrix. */
  readonly offset: number
  /** Numbers before those of the first matrix in a state tensor that has one number for each row or column. */
  readonly lines: number
  readonly count: number
  /** The plan's output_scale for these matrices. */
  readonly factor: number
}

/** A part of a job, which is copied and computed while other parts of the job are copied to the device or back. */
export type Piece = { readonly stacks: readonly Stack[]; readonly offset: number; readonly elements: number }

/** The most matrices of a list that goes through Newton-Schulz together. */
export const TOGETHER = 32
/**
 * Elements of matrices that are copied to and from the device at once, and that scratch memory has room to compute
 * together: five of 2048x7168 or of 2048x8192, whose products fill 66 clusters three times; those of four take as long.
 */
export const TOGETHER_ELEMENTS = 80 << 20

// Copying them takes about 0.3 ms. Smaller batches would spend the gain on launches.
const BATCH_ELEMENTS = 8 << 20
// The second dimension of a grid has at most 65535 blocks.
const MOST_MATRICES = 1 << 15
const PACKS_PER_THREAD = 4

/** The pieces of a plan, in the order of the tensor. The cuts depend on the plan alone. */
export function piecesOf(plan: Plan): Piece[] {
  const pieces: { stacks: Stack[]; offset: number; elements: number }[] = []
  let matrices = 0
  for (const stack of stacksOf(plan).flatMap(cut)) {
    const elements = elementsOf(stack)
    const last = pieces.at(-1)
    const joins = last && last.elements + elements <= BATCH_ELEMENTS && matrices + stack.count <= MOST_MATRICES
    matrices = joins ? matrices + stack.count : stack.count
    if (!joins) pieces.push({ stacks: [stack], offset: stack.offset, elements })
    else {
      last.stacks.push(stack)
      last.elements += elements
    }
  }
  return pieces
}

/** Cuts pieces into batches of enough elements: the copies of one batch overlap with the computation of others. */
export function batchesOf<P extends { readonly elements: number }>(pieces: readonly P[]): P[][] {
  const batches: P[][] = []
  let elements = BATCH_ELEMENTS
  for (const piece of pieces) {
    if (elements >= BATCH_ELEMENTS) {
      batches.push([])
      elements = 0
    }
    batches.at(-1)?.push(piece)
    elements += piece.elements
  }
  return batches
}

type ListLimits<M> = {
  readonly room: number
  readonly workspaceOf: (rows: number, cols: number) => number
  readonly most?: number
  readonly costOf?: (matrix: M) => (count: number) => number
}

/**
 * Cuts matrices into lists that go through Newton-Schulz together, sorted by shape so that few lists are distinct. A
 * list has at most `most` matrices, and its workspaces, of `workspaceOf` bytes each, have `room` bytes. Equal matrices
 * that have to be cut are cut such that their lists, of `costOf` the count each, cost least.
 */
export function listsOf<M extends { readonly stack: Stack }>(
  matrices: readonly M[],
  { room, workspaceOf, most = TOGETHER, costOf }: ListLimits<M>,
): M[][] {
  const lists: M[][] = []
  let bytes = 0
  for (const run of runsOf(matrices)) {
    const { rows, cols } = run[0].stack
    const workspace = workspaceOf(rows, cols)
    const longest = Math.max(1, Math.min(most, Math.floor(room / workspace)))
    let at = 0
    for (const count of countsOf(run.length, longest, run.length > longest ? costOf?.(run[0]) : undefined)) {
      const part = run.slice(at, at + count)
      const last = lists.at(-1)
      // Only the first part goes with matrices of other shapes, the others are as long as they should be.
      const joins = last && at === 0 && last.length + count <= most && bytes + count * workspace <= room
      if (joins) last.push(...part)
      else lists.push(part)
      bytes = (joins ? bytes : 0) + count * workspace
      at += count
    }
  }
  return lists
}

/** The matrices of one shape each, in the order of shapes. */
function runsOf<M extends { readonly stack: Stack }>(matrices: readonly M[]): M[][] {
  const key = ({ stack }: M) => stack.rows * 2 ** 20 + stack.cols
  const runs: M[][] = []
  for (const matrix of [...matrices].sort((a, b) => key(a) - key(b))) {
    const last = runs.at(-1)
    if (last && key(last[0]) === key(matrix)) last.push(matrix)
    else runs.push([matrix])
  }
  return runs
}

// From so many of the longest lists on, all but the last few are of the length that costs least for each matrix.
const SEARCHED_LISTS = 4

/** The lengths of the lists of `count` equal matrices, the shortest first: together they cost least. */
function countsOf(count: number, longest: number, cost: (count: number) => number = () => 1): number[] {
  if (count <= longest) return [count]
  const costs = Array.from({ length: longest + 1 }, (_, length) => cost(length))
  const each = (length: number) => costs[length] / length
  const cheapest = costs.reduce((best, _, length) => (length > 0 && each(length) <= each(best) ? length : best), 1)
  const equal = Math.max(0, Math.ceil((count - SEARCHED_LISTS * longest) / cheapest))
  const rest = leastCounts(count - equal * cheapest, costs)
  return [...rest, ...new Array<number>(equal).fill(cheapest)].sort((a, b) => a - b)
}

/** Of all ways to share `count` matrices out among lists of `costs.length - 1` at most, the one that costs least. */
function leastCounts(count: number, costs: readonly number[]): number[] {
  const least = [{ cost: 0, last: 0 }]
  for (let n = 1; n <= count; n++) {
    const ways = costs
      .slice(0, n + 1)
      .map((cost, last) => ({ cost: last > 0 ? cost + least[n - last].cost : Infinity, last }))
    least.push(ways.reduce((best, way) => (way.cost <= best.cost ? way : best)))
  }
  const counts: number[] = []
  for (let n = count; n > 0; n -= least[n].last) counts.push(least[n].last)
  return counts
}

export function isMuon(stack: Stack): stack is Stack<MuonSpec> {
  return stack.spec.kind === 'muon'
}

/** The elements that a thread takes at once: a number such that every matrix starts and ends on a multiple of it. */
export function packOf({ rows, cols, offset, spec }: Stack): number {
  return spec.kind === 'muon' && (rows * cols) % VECTOR === 0 && offset % VECTOR === 0 ? VECTOR : 1
}

/** The blocks of threads for each matrix of a stack. */
export function blocksFor(stack: Stack): number {
  return blocksOf((stack.rows * stack.cols) / packOf(stack))
}

export function scanBlocks(bytes: number): number {
  return blocksOf(bytes / 16)
}

/** The number of a job's partial sums that tell whether its result is finite. */
export function checkBlocksOf(pieces: readonly Piece[]): number {
  return pieces.flatMap(({ stacks }) => stacks).reduce((sum, stack) => sum + stack.count * blocksFor(stack), 0)
}

/**
 * Bytes for the partial sums of a job: the scans of its gradient and its update in kernels of their own, its checks,
 * and the scan of its update in the kernel that writes it.
 */
export function partialBytes(checkBlocks: number): number {
  return (2 * MAX_BLOCKS + 2 * checkBlocks) * PARTIAL_BYTES
}

/** The tensors of a job that are scanned by the kernels that read or write them anyway. */
export type ScannedInPassing = { readonly gradient: boolean; readonly update: boolean }

/** Packs of four elements are whole words of a fingerprint. NorMuon's update is scanned by itself. */
export function scannedInPassing(pieces: readonly Piece[]): ScannedInPassing {
  const stacks = pieces.flatMap((piece) => piece.stacks)
  const gradient = stacks.every((stack) => packOf(stack) === VECTOR)
  return { gradient, update: gradient && stacks.every(({ spec }) => spec.kind === 'muon' && !spec.second_momentum) }
}

/** The tasks of a plan as stacks: tasks of one shape and factor that follow each other are one. */
function stacksOf(plan: Plan): Stack[] {
  const stacks: { -readonly [Key in keyof Stack]: Stack[Key] }[] = []
  for (const task of plan.tasks) {
    const factor = task.output_scale ?? plan.scalars.output_scale ?? 1
    const spec = task.kernel ?? plan.kernel
    const lines = task.line_offset ?? 0
    const stack = { ...asMatrix(task), spec, offset: task.offset, lines, count: 1, factor }
    const last = stacks.at(-1)
    if (last && follows(last, stack)) last.count += 1
    else stacks.push(stack)
  }
  return stacks
}

// Tasks of one shape have one kernel: kernels differ only in `tall` and in `second_momentum`, which the shape decides.
function follows(last: Stack, { rows, cols, offset, factor }: Stack): boolean {
  const same = last.rows === rows && last.cols === cols && last.factor === factor
  return same && offset === last.offset + elementsOf(last)
}

function asMatrix({ dims }: Task): { rows: number; cols: number } {
  const [rows, cols = 1] = dims
  return { rows, cols }
}

/** Cuts a stack into stacks that each fit into a piece: between matrices, and a range of elements anywhere. */
function cut(stack: Stack): Stack[] {
  if (!isMuon(stack)) return cutElements(stack)
  const most = Math.max(1, Math.min(MOST_MATRICES, Math.floor(TOGETHER_ELEMENTS / (stack.rows * stack.cols))))
  return Array.from({ length: Math.ceil(stack.count / most) }, (_, i) => ({
    ...stack,
    offset: stack.offset + i * most * stack.rows * stack.cols,
    lines: stack.lines + i * most * Math.max(stack.rows, stack.cols),
    count: Math.min(most, stack.count - i * most),
  }))
}

function cutElements(stack: Stack): Stack[] {
  const elements = elementsOf(stack)
  return Array.from({ length: Math.ceil(elements / BATCH_ELEMENTS) }, (_, i) => ({
    ...stack,
    rows: Math.min(BATCH_ELEMENTS, elements - i * BATCH_ELEMENTS),
    cols: 1,
    offset: stack.offset + i * BATCH_ELEMENTS,
  }))
}

function elementsOf({ rows, cols, count }: Stack): number {
  return rows * cols * count
}

/** The blocks of threads for so many packs. */
export function blocksOf(packs: number): number {
  return Math.max(1, Math.min(MAX_BLOCKS, Math.ceil(packs / (THREADS * PACKS_PER_THREAD))))
}
