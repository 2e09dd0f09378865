import assert from 'node:assert'
import { bytesPerElement } from '../../../kernels/dtype.js'
import { type KernelSpec, kernelKey } from '../../../kernels/kernel.js'
import { type Job, type JobResult, scalarOf } from '../job.js'
import { addressOf, copyMemory, type Pointer } from '../onnx/onnxruntime.js'
import { elementwiseModule, LAYOUT, scalarNames, TURN, WINDOW_ELEMENTS } from './elementwise-code.js'
import { type ElementwiseSpec, type Formula, formulaOf } from './formulas.js'
import { OVERFLOW } from './narrow-code.js'
import { WindowScan } from './scan-code.js'
import { instantiate, type WasmEntry } from './wasm.js'

const STATE_BYTES = 4
const LANES = 4
const INFINITY_BITS = OVERFLOW.float32

/**
 * Computes elementwise kernels on the CPU in one pass over the memory: gradient and state are copied into the memory of
 * a WebAssembly module, a window at a time, and from there the next state and the update to where they belong. The bits
 * are those of the kernel's ONNX graph.
 */
export class Elementwise {
  readonly #programs = new Map<string, Program>()
  #last: { spec: KernelSpec; program: Program } | undefined

  /** Compiles the kernel, so that no job waits for it. Throws WebAssembly.CompileError where the engine has no SIMD. */
  load(spec: ElementwiseSpec): Program {
    // The jobs of one message share their plan.
    if (this.#last?.spec === spec) return this.#last.program
    const key = kernelKey(spec)
    const program = this.#programs.get(key) ?? new Program(spec)
    this.#programs.set(key, program)
    this.#last = { spec, program }
    return program
  }

  run(job: Job, spec: ElementwiseSpec): JobResult {
    return this.load(spec).run(job)
  }
}

/** One kernel, with windows of its own. */
class Program {
  readonly #spec: ElementwiseSpec
  readonly #formula: Formula
  readonly #names: readonly string[]
  readonly #memory: Uint8Array<ArrayBuffer>
  readonly #address: Pointer
  readonly #lanes: DataView
  readonly #step: WasmEntry
  readonly #gradientScan: WindowScan
  readonly #updateScan: WindowScan

  constructor(spec: ElementwiseSpec) {
    const { memory, entry } = instantiate(elementwiseModule(spec))
    const { gradient_dtype, update_dtype } = spec
    this.#spec = spec
    this.#formula = formulaOf(spec)
    this.#names = scalarNames(this.#formula)
    this.#memory = memory
    this.#address = addressOf(memory)
    this.#lanes = new DataView(memory.buffer)
    this.#step = entry('step')
    this.#gradientScan = new WindowScan(
      { memory, call: entry('gradient') },
      { dtype: gradient_dtype, record: LAYOUT.gradientScan, window: LAYOUT.gradient },
    )
    this.#updateScan = new WindowScan(
      { memory, call: entry('update') },
      { dtype: update_dtype, record: LAYOUT.updateScan, window: LAYOUT.update },
    )
  }

  run(job: Job): JobResult {
    const started = performance.now()
    const elements = this.#elementsOf(job)
    this.#begin(job)
    for (let at = 0; at < elements; at += WINDOW_ELEMENTS) {
      this.#window(job, at, Math.min(WINDOW_ELEMENTS, elements - at))
    }
    return { ...this.#result(job), computeSeconds: (performance.now() - started) / 1000 }
  }

  #elementsOf({ plan: { tasks }, gradient, update }: Job): number {
    const { gradient_dtype, update_dtype } = this.#spec
    const [{ dims, offset }] = tasks
    const [elements] = dims
    assert(tasks.length === 1 && offset === 0, 'an elementwise plan has one task of all elements')
    const isRead = gradient.bytes === elements * bytesPerElement(gradient_dtype)
    const isWritten = update.bytes === elements * bytesPerElement(update_dtype)
    assert(isRead && isWritten, 'gradient and update have as many elements as the plan')
    return elements
  }

  #begin(job: Job): void {
    const given = this.#formula.scalars((name) => scalarOf(job, name))
    for (const [i, name] of this.#names.entries()) {
      const value = name === 'gradient_scale' ? job.gradient_scale : given[name]
      for (let lane = 0; lane < LANES; lane++) {
        this.#lanes.setFloat32(LAYOUT.scalars + 4 * (LANES * i + lane), value, true)
      }
    }
    this.#memory.fill(0, LAYOUT.checked, LAYOUT.data + 4 * LANES)
    this.#gradientScan.reset()
    this.#updateScan.reset()
  }

  /** Computes `count` elements from element `from` on. */
  #window(job: Job, from: number, count: number): void {
    const padded = Math.ceil(count / TURN) * TURN
    const width = bytesPerElement(this.#spec.gradient_dtype)
    this.#receive(job, from * width, count * width)
    this.#memory.fill(0, LAYOUT.gradient + count * width, LAYOUT.gradient + padded * width)
    this.#gradientScan.add(count * width)
    for (const i of job.next.keys()) {
      const window = LAYOUT.state(i)
      const known = job.state === undefined ? 0 : count * STATE_BYTES
      if (job.state) copyMemory(this.#address + BigInt(window), job.state[i] + BigInt(from * STATE_BYTES), known)
      this.#memory.fill(0, window + known, window + padded * STATE_BYTES)
    }
    this.#step(padded * STATE_BYTES)
    for (const [i, next] of job.next.entries()) {
      const target = next + BigInt(from * STATE_BYTES)
      copyMemory(target, this.#address + BigInt(LAYOUT.state(i)), count * STATE_BYTES)
    }
    this.#send(job, from, count)
  }

  /** Copies the gradient's next bytes here. A client's memory is read once: the copy goes on to the gradient. */
  #receive({ gradient, source }: Job, from: number, bytes: number): void {
    const window = this.#address + BigInt(LAYOUT.gradient)
    const at = BigInt(from)
    copyMemory(window, (source ?? gradient).pointer + at, bytes)
    if (source) copyMemory(gradient.pointer + at, window, bytes)
  }

  #send({ update }: Job, from: number, count: number): void {
    const width = bytesPerElement(this.#spec.update_dtype)
    this.#updateScan.add(count * width)
    const target = update.pointer + BigInt(from * width)
    copyMemory(target, this.#address + BigInt(LAYOUT.update), count * width)
  }

  #result(job: Job): Omit<JobResult, 'computeSeconds'> {
    const gradient = this.#gradientScan.result(job.gradient.bytes)
    const none = {
      gradientFingerprint: gradient.fingerprint,
      gradientSquare: gradient.squareSum,
      updateFingerprint: 0n,
      updateSquare: 0,
    }
    if (job.expected !== undefined && job.expected !== gradient.fingerprint) {
      return { ...none, outcome: 'other_gradient' }
    }
    if (!gradient.finite || !this.#finite()) return { ...none, outcome: 'not_finite' }
    const { fingerprint, squareSum } = this.#updateScan.result(job.update.bytes)
    return { ...none, outcome: 'computed', updateFingerprint: fingerprint, updateSquare: squareSum }
  }

  /** Whether the next state and the update are finite. */
  #finite(): boolean {
    return (
      this.#largest(LAYOUT.checked) < INFINITY_BITS && this.#largest(LAYOUT.data) < OVERFLOW[this.#spec.update_dtype]
    )
  }

  #largest(at: number): number {
    let largest = 0
    for (let lane = 0; lane < LANES; lane++) largest = Math.max(largest, this.#lanes.getInt32(at + 4 * lane, true))
    return largest
  }
}
