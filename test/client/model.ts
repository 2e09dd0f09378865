import { bfloat16ToNumber, numberToBfloat16 } from '../../kernels/narrow.js'
import type { Gradient, OpenOptions, Parameter, Weights } from '../../src/client/client.js'

/** Numbers in [-1, 1): mulberry32, so that a test can be repeated. */
export function randomFrom(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 31 - 1
  }
}

const SHAPES = [
  { name: 'wide', shape: [24, 40], group: 'hidden' },
  { name: 'tall', shape: [33, 16], group: 'hidden', gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' },
  { name: 'half', shape: [12, 20], group: 'hidden', update_dtype: 'float16' },
  { name: 'norm', shape: [37], group: 'rest' },
  { name: 'head', shape: [10, 16], group: 'rest', update_dtype: 'bfloat16' },
] as const

/** A model of every dtype whose second and last weights are bfloat16, always with the same values. */
export function modelOf(run: string): OpenOptions & { parameters: Parameter[] } {
  const random = randomFrom(1)
  const parameters = SHAPES.map((declaration): Parameter => {
    const elements = declaration.shape.reduce((product, dimension) => product * dimension, 1)
    const values = Float32Array.from({ length: elements }, random)
    const isHalf = declaration.name === 'tall' || declaration.name === 'head'
    return { ...declaration, data: isHalf ? Uint16Array.from(values, numberToBfloat16) : values }
  })
  const groups = [
    { name: 'hidden', algorithm: 'muon', lr: 0.02, weight_decay: 0.1 },
    { name: 'rest', algorithm: 'adamw', lr: 0.003 },
  ]
  return { run, groups, parameters }
}

/** Gradients that depend on the weights, so an update applied twice, or never, changes every later digest. */
export function gradientsOf(parameters: readonly Parameter[], step: number): Gradient[] {
  const random = randomFrom(1000 + step)
  return parameters.map(({ data, gradient_dtype }) => {
    const gradient = Float32Array.from(data, (stored) => weightOf(stored, data) + 0.1 * random())
    return gradient_dtype === 'bfloat16' ? Uint16Array.from(gradient, numberToBfloat16) : gradient
  })
}

function weightOf(stored: number, data: Weights): number {
  return data instanceof Float32Array ? stored : bfloat16ToNumber(stored)
}

/** All weights as bytes, to be compared bit for bit. */
export function weightsOf(parameters: readonly Parameter[]): Buffer[] {
  return parameters.map(({ data }) =>
    Buffer.from(Uint8Array.from(Buffer.from(data.buffer, data.byteOffset, data.byteLength))),
  )
}
