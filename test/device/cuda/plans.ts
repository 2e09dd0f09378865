import type { KernelSpec } from '../../../kernels/kernel.js'
import type { MuonSpec } from '../../../src/device/cuda/pieces.js'
import type { Plan, Task } from '../../../src/optimizer/plan.js'

const DTYPES = { gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' } as const
export const MUON: MuonSpec = { kind: 'muon', coefficients: [[2, -1.5, 0.5]], tall: false, ...DTYPES }
export const ADAMW: KernelSpec = { kind: 'adamw', ...DTYPES }

export function planOf(kernel: KernelSpec, tasks: readonly Task[], scalars: Plan['scalars'] = {}): Plan {
  return { kernel, tasks, scalars, scale: 1, decay: 0, rms_factor: 1 }
}

/** `count` matrices of one shape, one behind the other. */
export function matrices(count: number, rows: number, cols: number): Plan {
  const tasks = Array.from({ length: count }, (_, i) => ({ dims: [rows, cols], offset: i * rows * cols }))
  return planOf(MUON, tasks, { output_scale: 1 })
}
