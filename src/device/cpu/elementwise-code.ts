import { bytesPerElement, type Dtype } from '../../../kernels/dtype.js'
import { kernelIo } from '../../../kernels/kernel.js'
import { type ElementwiseSpec, type Formula, formulaOf } from './formulas.js'
import { decodeEight, encodeEight, magnitudeBits } from './narrow-code.js'
import { SCAN_BYTES, scanFunction } from './scan-code.js'
import {
  assemble,
  type Code,
  FunctionWriter,
  i32,
  local,
  PAGE,
  type Variable,
  v128,
  type WasmFunction,
} from './wasm.js'

/** The elements of a window: with gradient, states and update it takes at most 320 KiB and stays in a core's cache. */
export const WINDOW_ELEMENTS = 16_384

/** How many elements one turn of the loop computes. */
export const TURN = 8

const FLOAT32_WINDOW = WINDOW_ELEMENTS * 4
const VECTOR = 16
const MOST_SCALARS = 8

/** Where everything lies in a module's memory. Next state is written over the state that it is made of. */
export const LAYOUT = {
  gradientScan: 0,
  updateScan: SCAN_BYTES,
  /** Each scalar in all four lanes, in the order of the formula, gradient_scale first. */
  scalars: 2 * SCAN_BYTES,
  /** The largest magnitudes as bits, four lanes each: of what is checked, and of the update before it is rounded. */
  checked: 2 * SCAN_BYTES + MOST_SCALARS * VECTOR,
  data: 2 * SCAN_BYTES + (MOST_SCALARS + 1) * VECTOR,
  gradient: PAGE,
  update: PAGE + FLOAT32_WINDOW,
  state: (index: number) => PAGE + (2 + index) * FLOAT32_WINDOW,
} as const

/**
 * A module for one kernel: `gradient` and `update` scan (scan-code.ts), and `step` computes. step(bytes) takes the
 * bytes of the elements as float32, for whole turns.
 */
export function elementwiseModule(spec: ElementwiseSpec): Uint8Array {
  const states = kernelIo(spec).state.length
  return assemble(LAYOUT.state(states) / PAGE, [
    scanFunction('gradient', spec.gradient_dtype, LAYOUT.gradientScan),
    scanFunction('update', spec.update_dtype, LAYOUT.updateScan),
    stepFunction(spec, states),
  ])
}

/** The names of a formula's scalars in the order in which they lie in the memory. */
export function scalarNames(formula: Formula): string[] {
  return ['gradient_scale', ...Object.keys(formula.scalars(() => 0))]
}

function stepFunction(spec: ElementwiseSpec, states: number): WasmFunction {
  const formula = formulaOf(spec)
  const writer = new FunctionWriter(['i32'])
  const end = local.get(0)
  const at = writer.variable(i32.const(0), 'i32')
  const halfAt = writer.variable(i32.const(0), 'i32')
  const atOf = (dtype: Dtype) => (bytesPerElement(dtype) === 4 ? at.get : halfAt.get)
  const fixed = (address: number) => writer.variable(v128.load(address, i32.const(0)))
  const scalars: Readonly<Record<string, Code>> = Object.fromEntries(
    scalarNames(formula).map((name, i) => [name, fixed(LAYOUT.scalars + i * VECTOR).get]),
  )
  const largest = { checked: fixed(LAYOUT.checked), data: fixed(LAYOUT.data) }
  const scalar = (name: string) => scalars[name]
  writer.while(i32.lessUnsigned(at.get, end), () => {
    const load = (offset: number) => v128.load(LAYOUT.gradient + offset, atOf(spec.gradient_dtype))
    const halves = decodeEight(spec.gradient_dtype, load, writer).map((gradient, half) => {
      const place = (index: number) => LAYOUT.state(index) + half * VECTOR
      const state = Array.from({ length: states }, (_, i) => v128.load(place(i), at.get))
      const scaled = writer.let(v128.f32x4.mul(gradient, scalar('gradient_scale')))
      const outputs = formula.write(writer, { gradient: scaled, state, scalar })
      for (const [i, next] of outputs.next.entries()) writer.do(v128.store(place(i), at.get, next))
      keepLargest(largest.checked, outputs.checked)
      keepLargest(largest.data, [outputs.data])
      return outputs.data
    })
    const encoded = encodeEight(spec.update_dtype, [halves[0], halves[1]], writer)
    for (const [i, vector] of encoded.entries())
      writer.do(v128.store(LAYOUT.update + i * VECTOR, atOf(spec.update_dtype), vector))
    at.set(i32.add(at.get, i32.const(TURN * 4)))
    halfAt.set(i32.add(halfAt.get, i32.const(TURN * 2)))
  })
  writer.do(v128.store(LAYOUT.checked, i32.const(0), largest.checked.get))
  writer.do(v128.store(LAYOUT.data, i32.const(0), largest.data.get))
  return writer.end('step')
}

function keepLargest(largest: Variable, values: readonly Code[]): void {
  for (const value of values) largest.set(v128.i32x4.maxSigned(largest.get, magnitudeBits(value)))
}
