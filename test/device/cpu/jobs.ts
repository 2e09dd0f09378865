import { bytesPerElement, type Dtype } from '../../../kernels/dtype.js'
import { kernelIo } from '../../../kernels/kernel.js'
import type { ElementwiseSpec } from '../../../src/device/cpu/formulas.js'
import type { Job } from '../../../src/device/job.js'
import type { OnnxExecutor } from '../../../src/device/onnx/onnx-executor.js'
import { openOnnxRuntime, viewMemory } from '../../../src/device/onnx/onnxruntime.js'
import { wholeOf } from '../../../src/device/region.js'

export const runtime = openOnnxRuntime()

/** Numbers of a gradient, as the name of what is special about them. */
export const FORMS = ['any bits', 'normal', 'tiny', 'huge', 'zero', 'negative zero', 'a NaN', 'an infinity'] as const
export type Form = (typeof FORMS)[number]

export type Case = {
  spec: ElementwiseSpec
  elements: number
  form: Form
  seed: number
  zeroState: boolean
  replay: boolean
  gradient_scale: number
  scalars: Readonly<Record<string, number>>
}

/** The update is the gradient: what is read is rounded and nothing else. */
export const PASSED_ON: Omit<Case, 'spec' | 'elements'> = {
  ...{ form: 'zero', seed: 1, zeroState: true, replay: false, gradient_scale: 1 },
  scalars: { c_m: 1, c_g: 0, n_m: 0, n_g: 1 },
}

export function makeJob({ spec, elements, form, seed, zeroState, gradient_scale, scalars }: Case): Job {
  const random = mulberry32(seed)
  const allocate = (bytes: number) => runtime.allocate(bytes)
  const region = (bytes: number) => wholeOf({ pointer: allocate(bytes), bytes }, 'host')
  const gradient = region(elements * bytesPerElement(spec.gradient_dtype))
  fill(viewMemory(gradient.pointer, gradient.bytes), spec.gradient_dtype, form, random)
  const states = kernelIo(spec).state
  const state = states.map(({ name }) => {
    const pointer = allocate(4 * elements)
    const values = new Float32Array(viewMemory(pointer, 4 * elements).buffer)
    for (let i = 0; i < elements; i++)
      values[i] = (random() - (name.includes('sq') ? 0 : 0.5)) * 2 ** (20 * random() - 15)
    return pointer
  })
  return {
    plan: { kernel: spec, tasks: [{ dims: [elements], offset: 0 }], scalars, scale: -1, decay: 0, rms_factor: 1 },
    gradient,
    gradient_scale,
    state: zeroState ? undefined : state,
    next: states.map(() => allocate(4 * elements)),
    update: region(elements * bytesPerElement(spec.update_dtype)),
  }
}

/** Frees a job's memory, of which the executor may have views. */
export function freeJob({ gradient, update, state = [], next }: Job, executor: OnnxExecutor): void {
  for (const pointer of [gradient.pointer, update.pointer, ...state, ...next]) {
    executor.forget(pointer)
    runtime.free(pointer)
  }
}

/** The bits of an infinity, and of the least, the usual and the largest magnitudes. */
const BITS: Record<Dtype, { infinity: number; tiny: number; normal: number; huge: number }> = {
  float32: { infinity: 0x7f800000, tiny: 0x00ffffff, normal: 0x3fffffff, huge: 0x7f7fffff },
  bfloat16: { infinity: 0x7f80, tiny: 0x00ff, normal: 0x3fff, huge: 0x7f7f },
  float16: { infinity: 0x7c00, tiny: 0x07ff, normal: 0x3fff, huge: 0x7bff },
}

function fill(bytes: Uint8Array<ArrayBuffer>, dtype: Dtype, form: Form, random: () => number): void {
  const wide = dtype === 'float32'
  const patterns = wide ? new Uint32Array(bytes.buffer) : new Uint16Array(bytes.buffer)
  const { infinity, tiny, normal, huge } = BITS[dtype]
  const sign = wide ? 0x80000000 : 0x8000
  const signed = (magnitude: number) => Math.floor(magnitude) + (random() < 0.5 ? sign : 0)
  const patternOf: Record<Form, () => number> = {
    'any bits': () => signed(random() * infinity),
    normal: () => signed(normal - random() * (normal / 8)),
    tiny: () => signed(random() * tiny),
    huge: () => signed(huge - random() * 64),
    zero: () => 0,
    'negative zero': () => sign,
    'a NaN': () => signed(normal - random() * (normal / 8)),
    'an infinity': () => signed(normal - random() * (normal / 8)),
  }
  for (let i = 0; i < patterns.length; i++) patterns[i] = patternOf[form]()
  const place = Math.floor(random() * patterns.length)
  if (form === 'a NaN') patterns[place] = signed(infinity + 1)
  if (form === 'an infinity') patterns[place] = signed(infinity)
}

/** float32 patterns beside every tie between two numbers of a narrower dtype, up to its largest; both signs. */
export function aroundTies(dtype: 'float16' | 'bfloat16'): Uint32Array {
  const patterns: number[] = []
  const { huge } = BITS[dtype]
  const at = (value: number) => new Uint32Array(Float32Array.of(value).buffer)[0]!
  const value = (pattern: number) =>
    dtype === 'bfloat16'
      ? new Float32Array(Uint32Array.of(pattern << 16).buffer)[0]!
      : (pattern >> 10 === 0 ? pattern & 1023 : 1024 + (pattern & 1023)) * 2 ** (Math.max(pattern >> 10, 1) - 25)
  for (let pattern = 0; pattern < huge; pattern++) {
    const tie = at((value(pattern) + value(pattern + 1)) / 2)
    for (const bits of [tie - 1, tie, tie + 1]) patterns.push(bits, bits + 0x80000000)
  }
  return Uint32Array.from(patterns)
}

/** Seeded uniform numbers in [0, 1): mulberry32 (Tommy Ettinger, public domain). */
function mulberry32(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let z = Math.imul(state ^ (state >>> 15), 1 | state)
    z = (z + Math.imul(z ^ (z >>> 7), 61 | z)) ^ z
    return ((z ^ (z >>> 14)) >>> 0) / 4294967296
  }
}
