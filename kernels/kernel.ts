import { adamw } from './adamw.js'
import type { Triple } from './coefficients.js'
import type { Dtype } from './dtype.js'
import { Graph } from './graph.js'
import { muon } from './muon.js'
import { sgd } from './sgd.js'

type Dtypes = { gradient_dtype: Dtype; update_dtype: Dtype }

/**
 * Names one ONNX graph: everything that is fixed when a model is built. Sizes are symbolic and numbers that change
 * from step to step are inputs, so one spec serves every parameter of its kind.
 * `coefficients` holds one triple per iteration; `tall` says rows > cols.
 */
export type KernelSpec =
  | ({ kind: 'muon'; coefficients: readonly Triple[]; tall: boolean } & Dtypes)
  | ({ kind: 'adamw' } & Dtypes)
  | ({ kind: 'sgd' } & Dtypes)

/**
 * Inputs, in order: `gradient` (gradient_dtype), each state (float32, same shape), each scalar (float32, [1]).
 * Outputs, in order: `<state>_next` for each state (float32), `data` (update_dtype), each check (float32, []):
 * `magnitude` is finite exactly when the next state and the direction are.
 */
export const KERNEL_IO: Readonly<
  Record<KernelSpec['kind'], { state: readonly string[]; scalars: readonly string[]; checks: readonly string[] }>
> = {
  muon: {
    state: ['momentum_buffer'],
    scalars: ['gradient_scale', 'c_m', 'c_g', 'n_m', 'n_g', 'eps', 'output_scale'],
    checks: ['magnitude'],
  },
  adamw: {
    state: ['exp_avg', 'exp_avg_sq'],
    scalars: ['gradient_scale', 'a_m', 'a_g', 'b_v', 'b_g', 'bias1', 'bias2_sqrt', 'eps'],
    checks: ['magnitude'],
  },
  sgd: {
    state: ['momentum_buffer'],
    scalars: ['gradient_scale', 'c_m', 'c_g', 'n_m', 'n_g'],
    checks: ['magnitude'],
  },
}

/** What a kernel adds to the graph: the next states in the order of KERNEL_IO, the update and what must be finite. */
export type KernelValues = { next: readonly string[]; data: string; checked: string }

/**
 * The ONNX model of a kernel. Its tensors have the shape [rows, cols] for muon and [n] for the others.
 * The kernels read their states and scalars by the names of KERNEL_IO. `half`: matrix products are of float16.
 */
export function buildKernel(spec: KernelSpec, { half = false } = {}): Uint8Array {
  const graph = new Graph(spec.kind)
  const { state, scalars } = KERNEL_IO[spec.kind]
  const dims = spec.kind === 'muon' ? ['rows', 'cols'] : ['n']
  const gradient = graph.input('gradient', spec.gradient_dtype, dims)
  for (const name of state) graph.input(name, 'float32', dims)
  for (const name of scalars) graph.input(name, 'float32', [1])

  const values = addKernel(
    graph,
    graph.mul(castTo(graph, gradient, [spec.gradient_dtype, 'float32']), 'gradient_scale'),
    { ...spec, half },
  )

  for (const [index, value] of values.next.entries()) graph.output(`${state[index]}_next`, value, { dims })
  graph.output('data', castTo(graph, values.data, ['float32', spec.update_dtype]), { dtype: spec.update_dtype, dims })
  graph.output('magnitude', magnitude(graph, values.checked), { dims: [] })
  return graph.bytes()
}

/** One text per distinct kernel, to find a loaded one by. */
export function kernelKey(spec: KernelSpec): string {
  const dtypes = `${spec.gradient_dtype}>${spec.update_dtype}`
  if (spec.kind !== 'muon') return `${spec.kind} ${dtypes}`
  return `${spec.kind} ${dtypes} ${spec.tall ? 'tall' : 'wide'} ${JSON.stringify(spec.coefficients)}`
}

function addKernel(graph: Graph, gradient: string, spec: KernelSpec & { half: boolean }): KernelValues {
  switch (spec.kind) {
    case 'muon':
      return muon(graph, gradient, spec)
    case 'adamw':
      return adamw(graph, gradient)
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
