import { adamw } from './adamw.js'
import type { Dtype } from './dtype.js'
import { type Dim, Graph } from './graph/graph.js'
import { muon } from './muon.js'
import type { Triple } from './orthogonalize/coefficients.js'
import { rmsprop } from './rmsprop.js'
import { sgd } from './sgd.js'

type Dtypes = { gradient_dtype: Dtype; update_dtype: Dtype }

/** What `muon` may be told beside its coefficients; left out: a float32 momentum buffer, no second momentum. */
export type MuonOptions = {
  coefficients: readonly Triple[]
  /** rows > cols. */
  tall: boolean
  momentum_dtype?: StateIo['dtype']
  /** NorMuon: which side of the matrix has a statistic for each of its lines. */
  second_momentum?: 'row' | 'col'
}

/**
 * Names one ONNX graph: everything that is fixed when a model is built. Sizes are symbolic and numbers that change
 * from step to step are inputs, so one spec serves every parameter of its kind.
 * `coefficients` holds one triple per iteration. `adamw` without decay is Adam.
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

/** What a kernel adds to the graph: the next states in the order of kernelIo, the update and what must be finite. */
export type KernelValues = { next: readonly string[]; data: string; checked: string }

/**
 * The ONNX model of a kernel. Its tensors have the shape [rows, cols] for muon ([rows, 1] or [1, cols] for what is kept
 * per row or column) and [n] for the others. The kernels read their states and scalars by the names of kernelIo. `half`: matrix
 * products are of float16.
 */
export function buildKernel(spec: KernelSpec, { half = false } = {}): Uint8Array {
  const graph = new Graph(spec.kind)
  const { state, scalars } = kernelIo(spec)
  const dims = spec.kind === 'muon' ? ['rows', 'cols'] : ['n']
  const typeOf = ({ dtype, per }: StateIo) => ({ dtype, dims: stateDims(per, dims) })
  const gradient = graph.input('gradient', spec.gradient_dtype, dims)
  for (const tensor of state) graph.input(tensor.name, tensor.dtype, stateDims(tensor.per, dims))
  for (const name of scalars) graph.input(name, 'float32', [1])

  const values = addKernel(
    graph,
    graph.mul(castTo(graph, gradient, [spec.gradient_dtype, 'float32']), 'gradient_scale'),
    { ...spec, half },
  )

  for (const [index, value] of values.next.entries())
    graph.output(`${state[index].name}_next`, value, typeOf(state[index]))
  graph.output('data', castTo(graph, values.data, ['float32', spec.update_dtype]), { dtype: spec.update_dtype, dims })
  graph.output('magnitude', magnitude(graph, values.checked), { dims: [] })
  return graph.bytes()
}

function stateDims(per: StateIo['per'], dims: readonly Dim[]): readonly Dim[] {
  if (per === 'element') return dims
  return per === 'row' ? ['rows', 1] : [1, 'cols']
}

/** One text per distinct kernel, to find a loaded one by. */
export function kernelKey(spec: KernelSpec): string {
  const dtypes = `${spec.gradient_dtype}>${spec.update_dtype}`
  const state = kernelIo(spec).state.map(({ name, dtype, per }) => `${name}:${dtype}:${per}`)
  if (spec.kind !== 'muon') return `${spec.kind} ${dtypes} ${state}`
  return `${spec.kind} ${dtypes} ${state} ${spec.tall ? 'tall' : 'wide'} ${JSON.stringify(spec.coefficients)}`
}

function addKernel(graph: Graph, gradient: string, spec: KernelSpec & { half: boolean }): KernelValues {
  switch (spec.kind) {
    case 'muon':
      return muon(graph, gradient, spec)
    case 'adamw':
      return adamw(graph, gradient, { amsgrad: spec.amsgrad ?? false })
    case 'rmsprop':
      return rmsprop(graph, gradient)
    case 'sgd':
      return sgd(graph, gradient, spec.update_dtype)
  }
}

function castTo(graph: Graph, value: string, [from, to]: readonly [Dtype, Dtype]): string {
  return from === to ? value : graph.cast(value, to)
}

/**
 * Σ|x|·2⁻⁶⁴: the power of two keeps a sum of fewer than 2⁶⁴ finite float32 numbers from overflowing.
 * A maximum would not do: ONNX Runtime's ReduceMax loses a NaN that is not the first element.
 */
function magnitude(graph: Graph, value: string): string {
  return graph.reduce('ReduceL1', graph.mul(value, graph.constant(2 ** -64)))
}
