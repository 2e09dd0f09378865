import type { KernelSpec } from '../../../kernels/kernel.js'
import { SMALLEST_NORMAL } from '../../../kernels/orthogonalize/newton-schulz.js'
import { type Code, type FunctionWriter, v128 } from './wasm.js'

const { add, mul, div, sqrt, max } = v128.f32x4

/** The kernels whose every element depends on the same element of the gradient and of the state alone. */
export type ElementwiseSpec = Exclude<KernelSpec, { kind: 'muon' }>

export function isElementwise(spec: KernelSpec): spec is ElementwiseSpec {
  return spec.kind !== 'muon'
}

/** Four elements of a kernel's inputs; `scalar(name)` has the scalar in every lane. */
export type Inputs = {
  /** The gradient times gradient_scale. */
  gradient: Code
  state: readonly Code[]
  scalar: (name: string) => Code
}

/** Four elements of a kernel's outputs; `checked` must be finite beside `data` for the step to count. */
export type Outputs = { next: readonly Code[]; data: Code; checked: readonly Code[] }

export type Formula = {
  /** The scalars that `write` asks for, out of those of kernelIo (`given`), each rounded to float32. */
  scalars: (given: (name: string) => number) => Readonly<Record<string, number>>
  write: (writer: FunctionWriter, inputs: Inputs) => Outputs
}

/**
 * The operations of the kernel's ONNX graph (kernels/adamw.ts, rmsprop.ts, sgd.ts) in the same order, each rounded to
 * float32: the bits are the same.
 */
export function formulaOf(spec: ElementwiseSpec): Formula {
  switch (spec.kind) {
    case 'adamw':
      return adamw(spec.amsgrad ?? false)
    case 'rmsprop':
      return RMSPROP
    case 'sgd':
      return SGD
  }
}

const { fround } = Math
// A quotient or a product of two float32 numbers, rounded to float64 and then to float32, is rounded as if once.
const quotient = (one: number, other: number) => fround(fround(one) / fround(other))
const product = (one: number, other: number) => fround(fround(one) * fround(other))

function adamw(amsgrad: boolean): Formula {
  return {
    scalars: (given) => ({
      a_m: given('a_m'),
      a_g: given('a_g'),
      b_v: given('b_v'),
      b_g: given('b_g'),
      factor: quotient(given('bias2_sqrt'), given('bias1')),
      floor: Math.max(product(given('eps'), given('bias2_sqrt')), SMALLEST_NORMAL),
    }),
    write: (writer, { gradient, state: [exp_avg, exp_avg_sq, max_exp_avg_sq], scalar }) => {
      const m = writer.let(add(mul(exp_avg, scalar('a_m')), mul(gradient, scalar('a_g'))))
      const square = mul(mul(gradient, gradient), scalar('b_g'))
      const v = writer.let(add(mul(exp_avg_sq, scalar('b_v')), square))
      const largest = amsgrad ? writer.let(max(max_exp_avg_sq, v)) : v
      const data = writer.let(div(mul(m, scalar('factor')), add(sqrt(largest), scalar('floor'))))
      return { next: amsgrad ? [m, v, largest] : [m, v], data, checked: [v] }
    },
  }
}

const RMSPROP: Formula = {
  scalars: (given) => ({
    b_v: given('b_v'),
    b_g: given('b_g'),
    c_m: given('c_m'),
    c_g: given('c_g'),
    floor: Math.max(fround(given('eps')), SMALLEST_NORMAL),
  }),
  write: (writer, { gradient, state: [square_avg, momentum_buffer], scalar }) => {
    const square = mul(mul(gradient, gradient), scalar('b_g'))
    const v = writer.let(add(mul(square_avg, scalar('b_v')), square))
    const step = div(gradient, add(sqrt(v), scalar('floor')))
    const buffer = writer.let(add(mul(momentum_buffer, scalar('c_m')), mul(step, scalar('c_g'))))
    return { next: [v, buffer], data: buffer, checked: [v] }
  },
}

// A buffer that is not finite makes the direction not finite, whatever n_m is: 0·∞ is NaN.
const SGD: Formula = {
  scalars: (given) => ({ c_m: given('c_m'), c_g: given('c_g'), n_m: given('n_m'), n_g: given('n_g') }),
  write: (writer, { gradient, state: [momentum_buffer], scalar }) => {
    const buffer = writer.let(add(mul(momentum_buffer, scalar('c_m')), mul(gradient, scalar('c_g'))))
    const direction = writer.let(add(mul(buffer, scalar('n_m')), mul(gradient, scalar('n_g'))))
    return { next: [buffer], data: direction, checked: [] }
  },
}
