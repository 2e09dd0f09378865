import { blocksOf } from '../../../kernels/blocks.js'
import { isBlockDtype, isWireDtype, kernelDtype, tensorBytes, type WireDtype } from '../../../kernels/dtype.js'
import type { ParameterDeclaration } from '../../wire/frame.js'
import { Ranges, rangesProblem } from '../../wire/ranges.js'
import { MuondError } from '../error.js'
import type { Weights } from './apply.js'

/**
 * A parameter as the trainer declares it: what `open` sends, and the array that its updates are applied to, in place.
 * With `ranges` the array has their elements alone, one behind the other, and so have gradients.
 */
export type Parameter = ParameterDeclaration & { readonly data: Weights }

/** float32, or bfloat16 or float16 as raw bits, in C order. What travels in blocks is given as float32. */
export type Gradient = Float32Array | Uint16Array

/**
 * A parameter in use: `dtype` of each direction is settled, `size` is in elements, of `ranges` out of the `elements` of
 * the whole tensor.
 */
export type Bound = {
  readonly index: number
  readonly name: string
  readonly size: number
  readonly elements: number
  readonly ranges: Ranges
  readonly data: Weights
  readonly gradient_dtype: WireDtype
  readonly update_dtype: WireDtype
}

/**
 * What goes into the open frame. @throws MuondError SHAPE_MISMATCH when `data` does not have the elements of `shape`
 */
export function declarationOf({ data, ...declaration }: Parameter): ParameterDeclaration {
  const { name, shape, ranges, gradient_dtype, update_dtype } = declaration
  const elements = sizeOf(shape)
  const dtypes = { gradient_dtype: dtype(gradient_dtype), update_dtype: dtype(update_dtype) }
  const problem = ranges && rangesProblem(ranges, { elements, ...dtypes })
  if (problem) throw new MuondError('PARAMETER_INVALID', `parameter '${name}': ${problem}`)
  const { elements: size } = rangesOf(declaration)
  if (data.length === size) return declaration
  const part = ranges ? ' with ranges' : ''
  const message = `parameter '${name}' has shape [${shape.join(', ')}]${part}, its data has ${data.length} elements, expected ${size}`
  throw new MuondError('SHAPE_MISMATCH', message)
}

/** What the run has accepted of the trainer's parameters, in use. */
export function bind(parameters: readonly Parameter[]): readonly Bound[] {
  return parameters.map((parameter, index) => {
    const { name, shape, data, gradient_dtype, update_dtype } = parameter
    const ranges = rangesOf(parameter)
    return {
      index,
      name,
      size: ranges.elements,
      elements: sizeOf(shape),
      ranges,
      data,
      gradient_dtype: dtype(gradient_dtype),
      update_dtype: dtype(update_dtype),
    }
  })
}

function dtype(name = 'float32'): WireDtype {
  if (isWireDtype(name)) return name
  throw new MuondError('DTYPE_UNSUPPORTED', `a parameter has dtype '${name}', which this client does not know`)
}

function rangesOf({ shape, ranges }: ParameterDeclaration): Ranges {
  return ranges ? new Ranges(ranges.map(([start, stop]) => [start, stop])) : Ranges.whole(sizeOf(shape))
}

function sizeOf(shape: readonly number[]): number {
  return shape.reduce((product, dimension) => product * dimension, 1)
}

/**
 * The gradient's bytes: a view, or for one that travels in blocks what it is encoded to.
 * @throws MuondError DTYPE_UNSUPPORTED (a Uint16Array for bfloat16 and float16, else a Float32Array), SHAPE_MISMATCH
 */
export function bytesOf(gradient: Gradient, parameter: Bound): Buffer {
  const { name, size, gradient_dtype } = parameter
  if (gradient instanceof Float32Array === isHalf(gradient_dtype)) {
    const message = `parameter '${name}' has gradient_dtype ${gradient_dtype}, the gradient is a ${gradient.constructor.name}`
    throw new MuondError('DTYPE_UNSUPPORTED', message, { parameter: parameter.index })
  }
  if (gradient.length !== size) {
    const message = `parameter '${name}' has ${size} elements, its gradient has ${gradient.length}`
    throw new MuondError('SHAPE_MISMATCH', message, { parameter: parameter.index })
  }
  if (isBlockDtype(gradient_dtype) && gradient instanceof Float32Array)
    return Buffer.from(blocksOf(gradient, gradient_dtype).buffer)
  return Buffer.from(gradient.buffer, gradient.byteOffset, gradient.byteLength)
}

function isHalf(dtype: WireDtype): boolean {
  return dtype === 'bfloat16' || dtype === 'float16'
}

/** An array for a gradient of a parameter, in the memory of `slot` where one is given. */
export function emptyGradient({ size, gradient_dtype }: Bound, slot?: Uint8Array<ArrayBuffer>): Gradient {
  const { buffer, byteOffset } = slot ?? new Uint8Array(tensorBytes(kernelDtype(gradient_dtype), size))
  return isHalf(gradient_dtype) ? new Uint16Array(buffer, byteOffset, size) : new Float32Array(buffer, byteOffset, size)
}
