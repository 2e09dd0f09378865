import { decodeBlocks } from '../../../kernels/blocks.js'
import {
  bytesPerElement,
  DTYPES,
  type Dtype,
  isBlockDtype,
  isDtype,
  kernelDtype,
  tensorBytes,
  type WireDtype,
} from '../../../kernels/dtype.js'
import type { Mean } from '../job.js'
import { addressOf, copyMemory } from '../onnx/onnxruntime.js'
import type { Span, Views } from '../region.js'
import { decodeEight } from './narrow-code.js'
import { assemble, FunctionWriter, i32, instantiate, local, PAGE, v128, type WasmFunction } from './wasm.js'

/** The elements of a window: the tensor's and the sum's together stay in a core's cache. */
const WINDOW_ELEMENTS = 16_384
/** How many elements one turn of the loop computes. */
const TURN = 8
const VECTOR = 16

/** Where everything lies in the module's memory; `share` is in all four lanes. */
const LAYOUT = { share: 0, tensor: PAGE, sum: 2 * PAGE } as const

const NAMES = Object.keys(DTYPES).filter(isDtype)

/**
 * Computes weighted means m of tensors g_0, g_1, …, every operation rounded to float32:
 *
 *     m = c_0 · g_0,  then for k = 1, 2, …  m = m + (c_k · g_k)
 *
 * It works on a window at a time, in memory of its own; a thread needs one. What travels in blocks is decoded there.
 */
export class Averager {
  readonly #memory
  readonly #tensor: Float32Array
  readonly #share: DataView
  readonly #entry

  /** Throws WebAssembly.CompileError where the engine has no SIMD. */
  constructor() {
    const functions = NAMES.flatMap((dtype) => [meanFunction(dtype, 'first'), meanFunction(dtype, 'next')])
    const { memory, entry } = instantiate(assemble(3, functions))
    this.#memory = addressOf(memory)
    this.#tensor = new Float32Array(memory.buffer, LAYOUT.tensor, WINDOW_ELEMENTS)
    this.#share = new DataView(memory.buffer, LAYOUT.share, VECTOR)
    this.#entry = entry
  }

  /** Writes the mean, float32, to `target`. The parts are finite and have as many elements. */
  write(target: Span, { dtype, parts }: Mean, views: Views): void {
    const wide = bytesPerElement('float32')
    const elements = target.bytes / wide
    const [first, next] = ['first', 'next'].map((turn) => this.#entry(`${turn}_${kernelDtype(dtype)}`))
    for (let at = 0; at < elements; at += WINDOW_ELEMENTS) {
      const count = Math.min(WINDOW_ELEMENTS, elements - at)
      const end = Math.ceil(count / TURN) * TURN * wide
      for (const [i, { span, share }] of parts.entries()) {
        for (let lane = 0; lane < VECTOR; lane += wide) this.#share.setFloat32(lane, share, true)
        this.#load(span, dtype, { at, count }, views)
        if (i === 0) first(end)
        else next(end)
      }
      copyMemory(target.pointer + BigInt(at * wide), this.#memory + BigInt(LAYOUT.sum), count * wide)
    }
  }

  /** Brings a window of a tensor, which begins where a block does. */
  #load(span: Span, dtype: WireDtype, { at, count }: { at: number; count: number }, views: Views): void {
    const [from, to] = [tensorBytes(dtype, at), tensorBytes(dtype, at + count)]
    if (isBlockDtype(dtype)) decodeBlocks(views.of(span).subarray(from, to), dtype, this.#tensor.subarray(0, count))
    else copyMemory(this.#memory + BigInt(LAYOUT.tensor), span.pointer + BigInt(from), to - from)
  }
}

/** A function of the bytes that the window's elements have as float32, for whole turns. */
function meanFunction(dtype: Dtype, turn: 'first' | 'next'): WasmFunction {
  const writer = new FunctionWriter(['i32'])
  const at = writer.variable(i32.const(0), 'i32')
  const halfAt = writer.variable(i32.const(0), 'i32')
  const share = writer.let(v128.load(LAYOUT.share, i32.const(0)))
  writer.while(i32.lessUnsigned(at.get, local.get(0)), () => {
    const place = bytesPerElement(dtype) === 4 ? at.get : halfAt.get
    const load = (offset: number) => v128.load(LAYOUT.tensor + offset, place)
    for (const [half, values] of decodeEight(dtype, load, writer).entries()) {
      const sum = LAYOUT.sum + half * VECTOR
      const part = v128.f32x4.mul(values, share)
      const added = turn === 'first' ? part : v128.f32x4.add(v128.load(sum, at.get), part)
      writer.do(v128.store(sum, at.get, added))
    }
    at.set(i32.add(at.get, i32.const(TURN * 4)))
    halfAt.set(i32.add(halfAt.get, i32.const(TURN * 2)))
  })
  return writer.end(`${turn}_${dtype}`)
}
