import type { ParameterDeclaration } from '../../src/wire/frame.js'

export type Workload = { name: string; parameters: readonly ParameterDeclaration[] }

type Shape = readonly [rows: number, cols: number]

/** The hidden matrices of two models and one layer of experts; torch_muon.py has the same lists. */
export const WORKLOADS: readonly Workload[] = [
  {
    name: 'gpt2',
    parameters: layers(12, [
      [2304, 768],
      [768, 768],
      [3072, 768],
      [768, 3072],
    ]),
  },
  {
    name: 'llama-1b',
    parameters: layers(16, [
      [2048, 2048],
      [2048, 2048],
      [512, 2048],
      [512, 2048],
      [8192, 2048],
      [8192, 2048],
      [2048, 8192],
    ]),
  },
  { name: 'experts', parameters: [{ ...parameter('experts', [48, 2048, 7168]), matrices: 'batch' }] },
]

function layers(count: number, shapes: readonly Shape[]): ParameterDeclaration[] {
  return Array.from({ length: count }, (_, layer) => shapes.map((shape, i) => parameter(`${layer}.${i}`, shape))).flat()
}

function parameter(name: string, shape: readonly number[]): ParameterDeclaration {
  return { name, shape, group: 'muon', gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' }
}
