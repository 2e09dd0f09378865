import { isPadded, paddedShape } from '../../../kernels/cuda/gemm-plan.js'
import { WORKSPACE_SQUARE, WORKSPACE_WIDE } from '../../../kernels/cuda/newton-schulz.js'
import { bytesPerElement } from '../../../kernels/dtype.js'
import type { Scratch } from '../executor.js'
import { type Demand, type GroupLimit, SLICE_ELEMENTS } from '../job.js'
import { aligned } from '../staging.js'
import { checkBlocksOf, isMuon, partialBytes, piecesOf, TOGETHER, TOGETHER_ELEMENTS } from './pieces.js'
import { isSmall, SMALL_TOGETHER, smallBytes } from './small.js'

/** Matrices and tensors in scratch memory start at multiples of this many bytes. */
export const ALIGNMENT = 256

/**
 * Which kernels a lane computes with: our own, our own but for ONNX Runtime's matrix products, or ONNX Runtime's alone.
 */
export type Kernels = 'own' | 'own_but_products' | 'onnx'

/** The largest sizes, in bytes, among the jobs of a lane: each number may come from another job. */
export type Largest = {
  /** One gradient. */
  readonly gradient: number
  /** One update. */
  readonly update: number
  /** The next state, and the update, for each byte of the gradient. */
  readonly stateRatio: number
  readonly updateRatio: number
  /** The partial sums of one job. */
  readonly partials: number
  /** The workspace of one matrix whose products are those of gemm.cu. */
  readonly workspace: number
  /** That workspace for each element of its matrix. */
  readonly workspaceRatio: number
  /** The workspaces of all such matrices of one job. */
  readonly workspaces: number
  /** The workspace of one matrix whose shorter side is small. */
  readonly small: number
  /** The input and the output of one matrix, or of one slice of a tensor, that goes through ONNX Runtime alone. */
  readonly alone: number
  /** What ONNX Runtime allocates for that matrix or slice. */
  readonly provider: number
}

const NOTHING: Largest = {
  ...{ gradient: 0, update: 0, stateRatio: 0, updateRatio: 0, partials: 0 },
  ...{ workspace: 0, workspaceRatio: 0, workspaces: 0, small: 0, alone: 0, provider: 0 },
}

const HALF_BYTES = 2
// Each matrix of a workspace, and the one without zeros added, may be padded to the next multiple of the alignment.
const WORKSPACE_PADDING = (WORKSPACE_WIDE.length + WORKSPACE_SQUARE.length + 1) * ALIGNMENT
// Matrices that ONNX Runtime's arena holds for Newton-Schulz: X and an iteration's result, and two Gram matrices, each
// with room for a second one.
const PROVIDER_WIDE = 2
const PROVIDER_SQUARE = 4
// Bytes of float32 intermediates that a whole kernel has for each element.
const KERNEL_BYTES = 40

/** Bytes of the workspace of one matrix: its own where zeros have to be added, and those that products are of. */
export function workspaceBytes(rows: number, cols: number): number {
  const padded = paddedShape({ rows, cols })
  const side = Math.min(padded.rows, padded.cols)
  const products = WORKSPACE_WIDE.length * halfBytes(padded) + WORKSPACE_SQUARE.length * halfBytes(square(side))
  return products + (isPadded({ rows, cols }) ? halfBytes({ rows, cols }) : 0)
}

/** Bytes that a float16 matrix takes of a workspace. */
export function halfBytes({ rows, cols }: { rows: number; cols: number }): number {
  return aligned(rows * cols * HALF_BYTES, ALIGNMENT)
}

const square = (side: number) => ({ rows: side, cols: side })

export function largestOf(demands: readonly Demand[], kernels: Kernels = 'onnx'): Largest {
  return largest(
    demands.map((demand) => (kernels === 'onnx' ? largestSlice(demand) : largestMatrices(demand, kernels))),
  )
}

export function largest(all: readonly Largest[]): Largest {
  const merge = (a: Largest, b: Largest): Largest => ({
    gradient: Math.max(a.gradient, b.gradient),
    update: Math.max(a.update, b.update),
    stateRatio: Math.max(a.stateRatio, b.stateRatio),
    updateRatio: Math.max(a.updateRatio, b.updateRatio),
    partials: Math.max(a.partials, b.partials),
    workspace: Math.max(a.workspace, b.workspace),
    workspaceRatio: Math.max(a.workspaceRatio, b.workspaceRatio),
    workspaces: Math.max(a.workspaces, b.workspaces),
    small: Math.max(a.small, b.small),
    alone: Math.max(a.alone, b.alone),
    provider: Math.max(a.provider, b.provider),
  })
  return all.reduce(merge, NOTHING)
}

/** The scratch memory that is enough for any group of jobs of at most these sizes. */
export function scratchFor(of: Largest, limit: GroupLimit): Scratch {
  const gradients = gradientsTogether(of, limit)
  const updates = Math.min(limit.jobs * of.update, gradients * of.updateRatio)
  const padding = limit.jobs * ALIGNMENT
  const filled = TOGETHER_ELEMENTS * of.workspaceRatio + TOGETHER * WORKSPACE_PADDING
  // A lane cuts its lists so that they fit.
  const list = Math.min(TOGETHER * of.workspace, LARGEST_TOGETHER * of.workspaces, filled)
  return {
    gradients: gradients + padding,
    updates: updates + padding,
    partials: limit.jobs * of.partials,
    products: Math.max(of.workspace, list, of.small, Math.min(SMALL_TOGETHER * of.small, SMALL_LIST_BYTES), of.alone),
    provider: of.provider,
    full: fullAt(of, limit),
  }
}

/** The most bytes of next state that one group of jobs writes before any of it is committed. */
export function stateInFlight(of: Largest, limit: GroupLimit): number {
  return gradientsTogether(of, limit) * of.stateRatio
}

export function totalOf({ gradients, updates, partials, products, provider }: Scratch): number {
  return gradients + updates + partials + products + provider
}

// Scratch memory is for so many of the largest gradients, and a group has that many of them or more of smaller ones.
const LARGEST_TOGETHER = 4
// Bytes of workspaces of small matrices from which on a list is cut, if it has several.
const SMALL_LIST_BYTES = 64 << 20

function fullAt(of: Largest, { bytes }: GroupLimit): number {
  return Math.min(bytes, (LARGEST_TOGETHER - 1) * of.gradient)
}

// The most bytes that the gradients of a group can have: it takes one more job as long as it is not full.
function gradientsTogether(of: Largest, limit: GroupLimit): number {
  return Math.min(limit.jobs * of.gradient, fullAt(of, limit) + of.gradient)
}

function largestMatrices(demand: Demand, kernels: Kernels): Largest {
  const pieces = piecesOf(demand.plan)
  const matrices = pieces.flatMap(({ stacks }) => stacks.filter(isMuon))
  let workspaces = 0
  const shapes = matrices.map(({ rows, cols, count }) => {
    if (isSmall(rows, cols)) return { ...NOTHING, small: smallBytes(rows, cols) }
    if (kernels !== 'own') return throughProvider(rows, cols)
    const workspace = workspaceBytes(rows, cols)
    workspaces += count * workspace
    return { ...NOTHING, workspace, workspaceRatio: workspace / (rows * cols) }
  })
  const own = { ...tensorsOf(demand), partials: aligned(partialBytes(checkBlocksOf(pieces)), ALIGNMENT), workspaces }
  return largest([own, ...shapes])
}

function throughProvider(rows: number, cols: number): Largest {
  const [elements, side] = [rows * cols, Math.min(rows, cols)]
  const provider = HALF_BYTES * (PROVIDER_WIDE * elements + PROVIDER_SQUARE * side * side)
  return { ...NOTHING, alone: 2 * aligned(elements * HALF_BYTES, ALIGNMENT), provider }
}

/** ONNX Runtime goes through one task, or one slice of it, at a time; before the first step its state is zeros. */
function largestSlice(demand: Demand): Largest {
  const elements = demand.plan.tasks.map(({ dims }) =>
    dims.length > 1 ? dims.reduce((product, dim) => product * dim, 1) : Math.min(SLICE_ELEMENTS, dims[0]),
  )
  const most = elements.reduce((a, b) => Math.max(a, b), 0)
  return { ...tensorsOf(demand), alone: most * bytesPerElement('float32'), provider: most * KERNEL_BYTES }
}

function tensorsOf({ gradient_bytes, update_bytes, state_bytes }: Demand): Largest {
  const ratios = { stateRatio: state_bytes / gradient_bytes, updateRatio: update_bytes / gradient_bytes }
  return { ...NOTHING, gradient: gradient_bytes, update: update_bytes, ...ratios }
}
