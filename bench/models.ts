import { bytesPerElement, type Dtype } from '../kernels/dtype.js'
import type { GroupDeclaration, ParameterDeclaration } from '../src/wire/frame.js'

/** A workload: the groups and parameters of its `open`, and the dtype of its gradients and updates. */
export type Model = {
  readonly name: string
  readonly groups: readonly GroupDeclaration[]
  readonly parameters: readonly ParameterDeclaration[]
  readonly dtype: Dtype
}

/** The algorithms that update the hidden matrices and the rest. */
export type Recipe = { readonly hidden: string; readonly rest: string; readonly dtype?: Dtype }

type Size = {
  readonly name: string
  readonly vocabulary: number
  readonly context: number
  readonly width: number
  readonly layers: number
}

/** GPT-2 124M (Radford et al. 2019) as torch stores it, [out, in], the head tied to `wte`: 124,439,808 elements. */
export const GPT2: Size = { name: 'GPT-2 124M', vocabulary: 50257, context: 1024, width: 768, layers: 12 }

/** The same architecture where fixed costs per tensor and step weigh most: 3,355,648 elements. */
export const SMALL: Size = { name: 'small 3M', vocabulary: 512, context: 128, width: 256, layers: 4 }

const ALGORITHMS: Readonly<Record<string, GroupDeclaration>> = {
  muon: { name: 'muon', algorithm: 'muon' },
  adamw: { name: 'adamw', algorithm: 'adamw' },
  sgd: { name: 'sgd', algorithm: 'sgd', momentum: 0.9 },
}

/** A GPT-2 of this size: hidden matrices in one group, embeddings, norms and biases in the other. */
export function transformer(size: Size, { hidden, rest, dtype = 'float32' }: Recipe): Model {
  const { name, vocabulary, context, width, layers } = size
  const parameter = (label: string, shape: readonly number[], group = rest): ParameterDeclaration => {
    return { name: label, shape, group, gradient_dtype: dtype, update_dtype: dtype }
  }
  const linear = (label: string, [out, into]: readonly [number, number]) => {
    return [parameter(`${label}.weight`, [out, into], hidden), parameter(`${label}.bias`, [out])]
  }
  const norm = (label: string) => [parameter(`${label}.weight`, [width]), parameter(`${label}.bias`, [width])]
  const layer = (index: number) => [
    ...norm(`h.${index}.ln_1`),
    ...linear(`h.${index}.attn.qkv`, [3 * width, width]),
    ...linear(`h.${index}.attn.proj`, [width, width]),
    ...norm(`h.${index}.ln_2`),
    ...linear(`h.${index}.mlp.fc`, [4 * width, width]),
    ...linear(`h.${index}.mlp.proj`, [width, 4 * width]),
  ]
  const parameters = [
    parameter('wte', [vocabulary, width]),
    parameter('wpe', [context, width]),
    ...Array.from({ length: layers }, (_, index) => layer(index)).flat(),
    ...norm('ln_f'),
  ]
  const names = [...new Set([hidden, rest])]
  return {
    name: `${name}, ${names.join(' + ')}, ${dtype}`,
    groups: names.map((group) => ALGORITHMS[group]),
    parameters,
    dtype,
  }
}

export function elementsOf({ shape }: ParameterDeclaration): number {
  return shape.reduce((product, size) => product * size, 1)
}

/** Bytes of one step's gradients; its updates are as many. */
export function gradientBytes({ parameters, dtype }: Model): number {
  return bytesPerElement(dtype) * parameters.reduce((sum, parameter) => sum + elementsOf(parameter), 0)
}

/** Bytes of optimizer state, all of it float32: two tensors for adamw, one for the others. */
export function stateBytes({ parameters }: Model): number {
  return parameters.reduce(
    (sum, parameter) => sum + 4 * elementsOf(parameter) * (parameter.group === 'adamw' ? 2 : 1),
    0,
  )
}

/** The matrices that Newton-Schulz runs on, [rows, cols] each. */
export function muonMatrices({ parameters }: Model): (readonly [number, number])[] {
  return parameters.flatMap(({ group, shape }) => (group === 'muon' ? [[shape[0], shape[1]] as const] : []))
}
