import type { Dtype } from './dtype.js'
import type { Triple } from './orthogonalize/coefficients.js'

type Dtypes = { gradient_dtype: Dtype; update_dtype: Dtype }

/**
 * The options of `muon`. Without `momentum_dtype` the buffer is float32, without `second_momentum` Muon is not NorMuon.
 */
export type MuonOptions = {
  coefficients: readonly Triple[]
  /** Whether the matrix has more rows than columns. */
  tall: boolean
  momentum_dtype?: StateIo['dtype']
  /** NorMuon keeps a statistic for each row or for each column of the matrix. */
  second_momentum?: 'row' | 'col'
}

/**
 * Everything that is fixed when a kernel's ONNX model is built. Sizes are symbolic and numbers that change from step to
 * step are inputs, so one spec serves every parameter of its kind. `coefficients` holds one triple per iteration.
 * `adamw` without decay is Adam.
 */
export type KernelSpec =
  | ({ kind: 'muon' } & MuonOptions & Dtypes)
  | ({ kind: 'adamw'; amsgrad?: true } & Dtypes)
  | ({ kind: 'rmsprop' } & Dtypes)
  | ({ kind: 'sgd' } & Dtypes)

/** One state tensor: a number for each element of the parameter, or for each row or column of its matrices. */
export type StateIo = {
  readonly name: string
  readonly dtype: 'float32' | 'bfloat16'
  readonly per: 'element' | 'row' | 'col'
}
type KernelIo = {
  readonly state: readonly StateIo[]
  readonly scalars: readonly string[]
  readonly checks: readonly string[]
}

/** The scalars of B' = c_m·B + c_g·G and u = n_m·B' + n_g·G. */
export const MOMENTUM_SCALARS = ['gradient_scale', 'c_m', 'c_g', 'n_m', 'n_g'] as const
const CHECKS = ['magnitude']

/**
 * The inputs and outputs of a kernel's model.
 * Inputs, in order: `gradient` (gradient_dtype), each state, each scalar (float32, [1]).
 * Outputs, in order: `<state>_next` for each state, `data` (update_dtype), each check (float32, []):
 * `magnitude` is finite exactly when the next state and the direction are.
 */
export function kernelIo(spec: KernelSpec): KernelIo {
  switch (spec.kind) {
    case 'muon':
      return muonIo(spec)
    case 'adamw':
      return {
        state: elementwise('exp_avg', 'exp_avg_sq', ...(spec.amsgrad ? ['max_exp_avg_sq'] : [])),
        scalars: ['gradient_scale', 'a_m', 'a_g', 'b_v', 'b_g', 'bias1', 'bias2_sqrt', 'eps'],
        checks: CHECKS,
      }
    case 'rmsprop':
      return {
        state: elementwise('square_avg', 'momentum_buffer'),
        scalars: ['gradient_scale', 'b_v', 'b_g', 'c_m', 'c_g', 'eps'],
        checks: CHECKS,
      }
    case 'sgd':
      return { state: elementwise('momentum_buffer'), scalars: MOMENTUM_SCALARS, checks: CHECKS }
  }
}

function muonIo({ momentum_dtype = 'float32', second_momentum }: MuonOptions): KernelIo {
  const buffer: StateIo = { name: 'momentum_buffer', dtype: momentum_dtype, per: 'element' }
  const scalars = [...MOMENTUM_SCALARS, 'eps', 'output_scale']
  if (!second_momentum) return { state: [buffer], scalars, checks: CHECKS }
  const second: StateIo = { name: 'second_momentum', dtype: 'float32', per: second_momentum }
  return { state: [buffer, second], scalars: [...scalars, 'b_v', 'b_g'], checks: CHECKS }
}

function elementwise(...names: readonly string[]): StateIo[] {
  return names.map((name) => ({ name, dtype: 'float32', per: 'element' }))
}

/**
 * The values that an algorithm adds to a graph: the next states in the order of kernelIo, the update, and the value
 * that must be finite for the step to count.
 */
export type KernelValues = { next: readonly string[]; data: string; checked: string }

/** A text that is the same for equal kernels only: the key under which a lane finds a loaded one. */
export function kernelKey(spec: KernelSpec): string {
  const dtypes = `${spec.gradient_dtype}>${spec.update_dtype}`
  const state = kernelIo(spec).state.map(({ name, dtype, per }) => `${name}:${dtype}:${per}`)
  if (spec.kind !== 'muon') return `${spec.kind} ${dtypes} ${state}`
  return `${spec.kind} ${dtypes} ${state} ${spec.tall ? 'tall' : 'wide'} ${JSON.stringify(spec.coefficients)}`
}
