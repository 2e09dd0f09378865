import { adamw } from './adamw.js'
import type { Dtype } from './dtype.js'
import { type Dim, Graph } from './graph/graph.js'
import { type KernelSpec, type KernelValues, kernelIo, type StateIo } from './kernel.js'
import { muon } from './muon.js'
import { rmsprop } from './rmsprop.js'
import { sgd } from './sgd.js'

/**
 * The ONNX model of a kernel. Its tensors have the shape [n]; those of muon [rows, cols], or [rows, 1] and [1, cols]
 * where a state has one number for each row or column. The algorithms read their states and scalars by the names of
 * kernelIo. With `half` matrix products are of float16.
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
