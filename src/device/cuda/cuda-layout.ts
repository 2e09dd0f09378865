import { VECTOR } from '../../../kernels/cuda/entry-points.js'
import { fitsGemm } from '../../../kernels/cuda/gemm-plan.js'
import { SLOT_SQUARE, SLOT_WIDE } from '../../../kernels/cuda/newton-schulz.js'
import { MAX_BLOCKS, PARTIAL_BYTES, THREADS } from '../../../kernels/cuda/source.js'
import { bytesPerElement } from '../../../kernels/dtype.js'
import type { KernelSpec } from '../../../kernels/kernel.js'
import type { Plan, Task } from '../../optimizer/plan.js'
import { type Demand, type JobGroup, SLICE_ELEMENTS } from '../job.js'
import { aligned } from '../staging.js'

export type MuonSpec = Extract<KernelSpec, { kind: 'muon' }>

/** Matrices of one shape that lie one behind the other, `offset` in elements; a range of elements where the algorithm is elementwise. */
export type Group<Spec extends KernelSpec = KernelSpec> = {
  readonly spec: Spec
  readonly rows: number
  readonly cols: number
  readonly offset: number
  /** Where the numbers of its first matrix's rows or columns start in a state tensor that has such. */
  readonly lines: number
  readonly count: number
  readonly factor: number
}

/** A part of a job that is copied, computed and copied back while others of its parts are on their way. */
export type Piece = { readonly groups: readonly Group[]; readonly offset: number; readonly elements: number }

/** What goes through Newton-Schulz together has at most so many matrices and elements: as much as fills the chip. */
export const TOGETHER = 32
export const TOGETHER_ELEMENTS = 64 << 20

/** Memory on the device starts at multiples of this. */
export const ALIGNMENT = 256

// About 0.3 ms of copying: less would be lost in launches.
const BATCH_ELEMENTS = 8 << 20
// The second dimension of a grid has at most 65535 blocks.
const MOST_MATRICES = 1 << 15
const PACKS_PER_THREAD = 4
const HALF_BYTES = 2

/** A plan's parts, in the order of the tensor. How they are cut depends on the plan alone. */
export function piecesOf(plan: Plan): Piece[] {
  const pieces: { groups: Group[]; offset: number; elements: number }[] = []
  let matrices = 0
  for (const group of groupsOf(plan).flatMap(cut)) {
    const elements = elementsOf(group)
    const last = pieces.at(-1)
    const joins = last && last.elements + elements <= BATCH_ELEMENTS && matrices + group.count <= MOST_MATRICES
    matrices = joins ? matrices + group.count : group.count
    if (!joins) pieces.push({ groups: [group], offset: group.offset, elements })
    else {
      last.groups.push(group)
      last.elements += elements
    }
  }
  return pieces
}

/** Cuts a list where enough elements are together: the copies of one batch overlap with the computation of the others. */
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

/** Cuts matrices into lists that go through Newton-Schulz together, the same shapes side by side: few lists are distinct then. */
export function listsOf<M extends { readonly group: Group }>(matrices: readonly M[]): M[][] {
  const key = ({ group }: M) => group.rows * 2 ** 20 + group.cols
  const lists: M[][] = []
  let elements = 0
  for (const matrix of [...matrices].sort((a, b) => key(a) - key(b))) {
    const size = matrix.group.rows * matrix.group.cols
    const last = lists.at(-1)
    const joins = last && last.length < TOGETHER && elements + size <= TOGETHER_ELEMENTS
    if (joins) last.push(matrix)
    else lists.push([matrix])
    elements = (joins ? elements : 0) + size
  }
  return lists
}

export function isMuon(group: Group): group is Group<MuonSpec> {
  return group.spec.kind === 'muon'
}

/** Elements that a thread takes at once: every matrix has to start and end on a multiple of them. */
export function packOf({ rows, cols, offset, spec }: Group): number {
  return spec.kind === 'muon' && (rows * cols) % VECTOR === 0 && offset % VECTOR === 0 ? VECTOR : 1
}

/** Blocks of threads for each matrix of a group. */
export function blocksFor(group: Group): number {
  return blocksOf((group.rows * group.cols) / packOf(group))
}

export function scanBlocks(bytes: number): number {
  return blocksOf(bytes / 16)
}

/** Partial sums that tell whether a job's result is finite. */
export function checkBlocksOf(pieces: readonly Piece[]): number {
  return pieces.flatMap(({ groups }) => groups).reduce((sum, group) => sum + group.count * blocksFor(group), 0)
}

/** Bytes for the partial sums of a job: the scans of its gradient and update, and its checks. */
export function partialBytes(checkBlocks: number): number {
  return (2 * MAX_BLOCKS + checkBlocks) * PARTIAL_BYTES
}

/** Bytes of one Newton-Schulz in a list of them. */
export function slotBytes(rows: number, cols: number): number {
  const side = Math.min(rows, cols)
  const matrix = (elements: number) => aligned(elements * HALF_BYTES, ALIGNMENT)
  return SLOT_WIDE.length * matrix(rows * cols) + SLOT_SQUARE.length * matrix(side * side)
}

/** The largest of what the jobs of a lane ask for, in bytes. */
export type Largest = {
  readonly gradient: number
  readonly update: number
  /** Of next state, for one byte of gradient. */
  readonly state: number
  readonly partials: number
  /** Of a matrix in a list, of one of its elements, and of all matrices of a job. */
  readonly slot: number
  readonly perElement: number
  readonly slots: number
  /** Of a matrix that goes alone through ONNX Runtime, and what that takes for it. */
  readonly alone: number
  readonly provider: number
}

/** Bytes of each region of a lane's scratch memory, and what ONNX Runtime takes beside it. */
export type Scratch = {
  readonly gradients: number
  readonly updates: number
  readonly partials: number
  readonly products: number
  readonly provider: number
}

const NOTHING: Largest = {
  ...{ gradient: 0, update: 0, state: 0, partials: 0 },
  ...{ slot: 0, perElement: 0, slots: 0, alone: 0, provider: 0 },
}

/** What lanes compute with: kernels and lists of products of our own, the products of ONNX Runtime, or that alone. */
export type Work = 'own' | 'own_but_products' | 'onnx'

export function largestOf(demands: readonly Demand[], work: Work = 'onnx'): Largest {
  return largest(
    demands.map((demand) => (work === 'onnx' ? largestOfKernels(demand) : largestOfMatrices(demand, work))),
  )
}

export function largest(all: readonly Largest[]): Largest {
  const merge = (a: Largest, b: Largest): Largest => ({
    gradient: Math.max(a.gradient, b.gradient),
    update: Math.max(a.update, b.update),
    state: Math.max(a.state, b.state),
    partials: Math.max(a.partials, b.partials),
    slot: Math.max(a.slot, b.slot),
    perElement: Math.max(a.perElement, b.perElement),
    slots: Math.max(a.slots, b.slots),
    alone: Math.max(a.alone, b.alone),
    provider: Math.max(a.provider, b.provider),
  })
  return all.reduce(merge, NOTHING)
}

/** What a lane needs for any group of jobs that are no larger than these: a group closes once its gradients have `bytes`. */
export function scratchFor(of: Largest, { jobs, bytes }: JobGroup): Scratch {
  const gradients = Math.min(jobs * of.gradient, bytes + of.gradient)
  // An update has at most twice the bytes of its gradient.
  const updates = Math.min(jobs * of.update, 2 * gradients)
  const padding = jobs * ALIGNMENT
  const filled = TOGETHER_ELEMENTS * of.perElement + TOGETHER * SLOT_PADDING
  const list = Math.min(TOGETHER * of.slot, jobs * of.slots, filled)
  return {
    gradients: gradients + padding,
    updates: updates + padding,
    partials: jobs * of.partials,
    products: Math.max(of.slot, list, of.alone),
    provider: of.provider,
  }
}

/** Bytes of next state that the groups of one lane write before they are committed. */
export function stateInFlight(of: Largest, { jobs, bytes }: JobGroup): number {
  return Math.min(jobs * of.gradient, bytes + of.gradient) * of.state
}

export function totalOf({ gradients, updates, partials, products, provider }: Scratch): number {
  return gradients + updates + partials + products + provider
}

const SLOT_PADDING = (SLOT_WIDE.length + SLOT_SQUARE.length) * ALIGNMENT
// X and the result of an iteration in turn, and two Gram matrices, with the arena's room for a second of each.
const PROVIDER_WIDE = 2
const PROVIDER_SQUARE = 4
// Float32 intermediates of a whole kernel for each element.
const KERNEL_BYTES = 40

function largestOfMatrices(demand: Demand, work: Work): Largest {
  const { plan } = demand
  const pieces = piecesOf(plan)
  const matrices = pieces.flatMap(({ groups }) => groups.filter(isMuon))
  let slots = 0
  const shapes = matrices.map(({ rows, cols, count }) => {
    const elements = rows * cols
    if (work === 'own' && fitsGemm(rows, cols)) {
      const slot = slotBytes(rows, cols)
      slots += count * slot
      return { ...NOTHING, slot, perElement: slot / elements }
    }
    const side = Math.min(rows, cols)
    const matrix = aligned(elements * HALF_BYTES, ALIGNMENT)
    const provider = HALF_BYTES * (PROVIDER_WIDE * elements + PROVIDER_SQUARE * side * side)
    return { ...NOTHING, alone: 2 * matrix, provider }
  })
  const own = { ...tensorsOf(demand), partials: partialBytes(checkBlocksOf(pieces)), slots }
  return largest([own, ...shapes])
}

/** ONNX Runtime goes through a task, or a slice of it, at a time; the state before the first step is zeros. */
function largestOfKernels(demand: Demand): Largest {
  const elements = demand.plan.tasks.map(({ dims }) =>
    dims.length > 1 ? dims.reduce((product, dim) => product * dim, 1) : Math.min(SLICE_ELEMENTS, dims[0]),
  )
  const most = elements.reduce((a, b) => Math.max(a, b), 0)
  return { ...tensorsOf(demand), alone: most * bytesPerElement('float32'), provider: most * KERNEL_BYTES }
}

function tensorsOf({ gradient_bytes, update_bytes, state_bytes }: Demand): Largest {
  return { ...NOTHING, gradient: gradient_bytes, update: update_bytes, state: state_bytes / gradient_bytes }
}

/** Tasks of one shape, kernel and factor that follow each other are one group. */
function groupsOf(plan: Plan): Group[] {
  const groups: { -readonly [Key in keyof Group]: Group[Key] }[] = []
  for (const task of plan.tasks) {
    const factor = task.output_scale ?? plan.scalars.output_scale ?? 1
    const spec = task.kernel ?? plan.kernel
    const lines = task.line_offset ?? 0
    const group = { ...asMatrix(task), spec, offset: task.offset, lines, count: 1, factor }
    const last = groups.at(-1)
    if (last && follows(last, group)) last.count += 1
    else groups.push(group)
  }
  return groups
}

// A task's kernel says no more than its shape does: which way to multiply.
function follows(last: Group, { rows, cols, offset, factor }: Group): boolean {
  const same = last.rows === rows && last.cols === cols && last.factor === factor
  return same && offset === last.offset + elementsOf(last)
}

function asMatrix({ dims }: Task): { rows: number; cols: number } {
  const [rows, cols = 1] = dims
  return { rows, cols }
}

/** A group in parts that each fit into a piece; a single matrix is never cut, a range of elements anywhere. */
function cut(group: Group): Group[] {
  if (!isMuon(group)) return cutElements(group)
  const most = Math.max(1, Math.min(MOST_MATRICES, Math.floor(TOGETHER_ELEMENTS / (group.rows * group.cols))))
  return Array.from({ length: Math.ceil(group.count / most) }, (_, i) => ({
    ...group,
    offset: group.offset + i * most * group.rows * group.cols,
    lines: group.lines + i * most * Math.max(group.rows, group.cols),
    count: Math.min(most, group.count - i * most),
  }))
}

function cutElements(group: Group): Group[] {
  const elements = elementsOf(group)
  return Array.from({ length: Math.ceil(elements / BATCH_ELEMENTS) }, (_, i) => ({
    ...group,
    rows: Math.min(BATCH_ELEMENTS, elements - i * BATCH_ELEMENTS),
    cols: 1,
    offset: group.offset + i * BATCH_ELEMENTS,
  }))
}

function elementsOf({ rows, cols, count }: Group): number {
  return rows * cols * count
}

function blocksOf(packs: number): number {
  return Math.max(1, Math.min(MAX_BLOCKS, Math.ceil(packs / (THREADS * PACKS_PER_THREAD))))
}
