import { kernelFlops } from '../../kernels/flops.js'
import type { Layout } from '../wire/frame.js'
import { planStep } from './algorithms/algorithm.js'
import { type Group, show } from './hyperparameters.js'
import { type Parameter, stateBytes } from './parameter.js'
import type { Task } from './plan.js'

/** `count` matrices of rows x cols of a parameter; `factor` is the f that adjust_lr_fn multiplies lr with. */
export type Matrices = { readonly count: number; readonly rows: number; readonly cols: number; readonly factor: number }

/**
 * What one step of a parameter computes. `decay` is lr·λ, `state_bytes` the parameter's state from its first step on,
 * and `flops` counts as kernels/flops.ts does. `why` names the group and explains the layout.
 */
export type Explanation = {
  readonly blocks: readonly Matrices[]
  readonly decay: number
  readonly state_bytes: number
  readonly flops: number
  readonly why: string
}

/** Explains a step of a parameter by its plan. `blocks` is empty where the algorithm is elementwise. */
export function explain(parameter: Parameter, group: Group): Explanation {
  const { kernel, tasks, rms_factor, decay } = planStep(parameter, group, { step: 1, replay: false })
  const counted = countSizes(tasks)
  const flops = counted.reduce((sum, { count, task }) => sum + count * kernelFlops(kernel, task.dims), 0)
  const blocks = counted.map(({ count, task }) => {
    const [rows, cols] = task.dims
    return { count, rows, cols, factor: rms_factor * (task.output_scale ?? 1) }
  })
  const why = `${route(group)}: ${layoutReason(parameter)}`
  const isMatrix = parameter.blocks.length > 0
  return { blocks: isMatrix ? blocks : [], decay, state_bytes: stateBytes(parameter), flops, why }
}

/** The layout in a word or two: `matrix`, `elements`, `batch, heads 8`. */
export function layoutName(parameter: Parameter): string {
  const { matrices, split, heads, blocks } = parameter
  if (blocks.length === 0) return 'elements'
  return [matrices, split && `split ${split.length}`, heads && `heads ${heads}`].filter(Boolean).join(', ') || 'matrix'
}

/** What the parameter's layout means, as half a sentence: `each of its 8 heads is a matrix`. */
export function layoutReason({ blocks, ...layout }: Parameter): string {
  if (blocks.length === 0) return 'each element for itself'
  const parts = [matricesReason(layout), rowsReason(layout)].filter((part) => part !== undefined)
  return parts.length > 0 ? parts.join('; ') : 'the tensor is one matrix'
}

function route({ name, algorithm, preset }: Group): string {
  return `group ${show(name)} asks for ${algorithm}${preset === undefined ? '' : ` as in preset ${show(preset)}`}`
}

function matricesReason({ matrices }: Layout): string | undefined {
  if (matrices === undefined) return undefined
  return matrices === 'batch' ? 'a matrix per leading index' : 'one matrix, its columns all dimensions but the first'
}

function rowsReason({ split, heads }: Layout): string | undefined {
  if (split) return `its rows are ${split.length} fused matrices`
  return heads === undefined ? undefined : `each of its ${heads} heads is a matrix`
}

/** Counts equal tasks: a parameter may have a quarter of a million of them, but of a handful of sizes. */
function countSizes(tasks: readonly Task[]): { count: number; task: Task }[] {
  const sizes = new Map<string, { count: number; task: Task }>()
  for (const task of tasks) {
    const size = sizes.get(String(task.dims))
    if (size) size.count += 1
    else sizes.set(String(task.dims), { count: 1, task })
  }
  return [...sizes.values()]
}
