import { bytesPerElement, DTYPES, type Dtype } from '../../kernels/dtype.js'
import { buildKernel, KERNEL_IO, type KernelSpec, kernelKey } from '../../kernels/kernel.js'
import type { Task } from '../optimizer/plan.js'
import {
  addressOf,
  type Executor,
  type HostBlock,
  type HostRange,
  type Job,
  type JobResult,
  type Need,
  SLICE_ELEMENTS,
  scalarOf,
} from './job.js'
import { type OnnxRuntime, openOnnxRuntime, type Pointer, type Session, viewMemory } from './onnxruntime.js'
import { createScanner } from './scan.js'

/** The folder of libonnxruntime and the threads of one session. */
export type CpuLane = { kind: 'cpu'; folder: string; threads: number }

const FLOAT32 = DTYPES.float32
// A step frame may change the coefficients and with them the graph: the least recently used session makes room.
const MAX_PROGRAMS = 64

/** A kernel's session with one resident tensor for each scalar input and for each check that it answers. */
type Program = { session: Session; spec: KernelSpec; scalars: (Resident & { name: string })[]; checks: Resident[] }

/** One float32 of native memory: ONNX Runtime keeps its address, so it must never move. */
type Resident = { value: Float32Array; tensor: Pointer; pointer: Pointer }

/** Computes jobs with ONNX Runtime's CPU provider, one at a time in the calling thread, in host memory alone. */
export class CpuExecutor implements Executor {
  readonly #threads: number
  readonly #runtime: OnnxRuntime
  readonly #scanner = createScanner()
  readonly #programs = new Map<string, Program>()
  readonly #views = new Map<Pointer, Uint8Array>()
  #zeros = new Uint8Array(0)

  constructor({ folder, threads }: CpuLane) {
    this.#threads = threads
    this.#runtime = openOnnxRuntime(folder)
  }

  load(needs: readonly Need[]): void {
    for (const { kernel } of needs) this.#program(kernel)
  }

  run(jobs: readonly Job[]): JobResult[] {
    return jobs.map((job) => this.#run(job))
  }

  #run(job: Job): JobResult {
    const started = performance.now()
    const gradient = this.#scanner.scan(this.#bytesOf(job.gradient), job.plan.kernel.gradient_dtype)
    const result = {
      gradientFingerprint: gradient.fingerprint,
      gradientSquare: gradient.squareSum,
      updateFingerprint: 0n,
      updateSquare: 0,
    }
    const finish = (outcome: JobResult['outcome']): JobResult => {
      return { ...result, outcome, computeSeconds: (performance.now() - started) / 1000 }
    }
    if (job.expected !== undefined && job.expected !== gradient.fingerprint) return finish('other_gradient')
    if (!gradient.finite || !this.#computeTasks(job)) return finish('not_finite')
    const update = this.#scanner.scan(this.#bytesOf(job.update), job.plan.kernel.update_dtype)
    result.updateFingerprint = update.fingerprint
    result.updateSquare = update.squareSum
    return finish(update.finite ? 'computed' : 'not_finite')
  }

  /** Runs every task of the plan; false where a check says that the next state would not be finite. */
  #computeTasks(job: Job): boolean {
    // A plan names few kernels and names them often: each is looked up once.
    const found = new Map<KernelSpec, Program>()
    return job.plan.tasks.flatMap(slices).every((task) => {
      const spec = task.kernel ?? job.plan.kernel
      const known = found.get(spec) ?? this.#program(spec)
      found.set(spec, known)
      return this.#computeTask(job, task, known)
    })
  }

  #computeTask(job: Job, task: Task, { session, spec, scalars, checks }: Program): boolean {
    for (const scalar of scalars) scalar.value[0] = scalarValue(job, task, scalar.name)
    const elements = task.dims.reduce((product, dim) => product * dim, 1)
    // Before anything that would have to be released if there is no memory for it.
    const zero = job.state ? 0n : this.#zeroMemory(elements * 4)
    const tensor = (base: Pointer, dtype: Dtype): Pointer => {
      const size = bytesPerElement(dtype)
      const memory = { pointer: base + BigInt(task.offset * size), bytes: elements * size }
      return this.#runtime.createTensor(memory, task.dims, DTYPES[dtype].onnx)
    }
    const zeroTensor = () => this.#runtime.createTensor({ pointer: zero, bytes: elements * 4 }, task.dims, FLOAT32.onnx)
    const gradient = tensor(addressOf(job.gradient), spec.gradient_dtype)
    const state = KERNEL_IO[spec.kind].state.map((_, i) => (job.state ? tensor(job.state[i], 'float32') : zeroTensor()))
    const next = job.next.map((pointer) => tensor(pointer, 'float32'))
    const data = tensor(addressOf(job.update), spec.update_dtype)
    try {
      const inputs = [gradient, ...state, ...scalars.map((scalar) => scalar.tensor)]
      this.#runtime.run(session, inputs, [...next, data, ...checks.map((check) => check.tensor)])
    } finally {
      for (const value of [gradient, ...state, ...next, data]) this.#runtime.releaseTensor(value)
    }
    return checks.every((check) => Number.isFinite(check.value[0]))
  }

  #program(spec: KernelSpec): Program {
    const key = kernelKey(spec)
    const known = this.#programs.get(key) ?? this.#makeProgram(spec)
    // A Map keeps the order of insertion, so its first entry is the least recently used one.
    this.#programs.delete(key)
    this.#programs.set(key, known)
    if (this.#programs.size > MAX_PROGRAMS) this.#dropOldest()
    return known
  }

  #dropOldest(): void {
    const [oldest] = this.#programs
    this.#programs.delete(oldest[0])
    this.#release(oldest[1])
  }

  #release({ session, scalars, checks }: Program): void {
    this.#runtime.releaseSession(session)
    for (const { tensor, pointer } of [...scalars, ...checks]) {
      this.#runtime.releaseTensor(tensor)
      this.#runtime.free(pointer)
    }
  }

  #makeProgram(spec: KernelSpec): Program {
    const { state, scalars, checks } = KERNEL_IO[spec.kind]
    const names = {
      inputs: ['gradient', ...state, ...scalars],
      outputs: [...state.map((name) => `${name}_next`), 'data', ...checks],
    }
    const session = this.#runtime.createSession(buildKernel(spec), names, { threads: this.#threads })
    return {
      session,
      spec,
      scalars: scalars.map((name) => ({ name, ...this.#resident([1]) })),
      checks: checks.map(() => this.#resident([])),
    }
  }

  #resident(dims: readonly number[]): Resident {
    const pointer = this.#runtime.allocate(4)
    const value = new Float32Array(viewMemory(pointer, 4).buffer)
    return { value, pointer, tensor: this.#runtime.createTensor({ pointer, bytes: 4 }, dims, FLOAT32.onnx) }
  }

  #bytesOf({ block, offset, bytes }: HostRange): Uint8Array {
    return this.#viewOf(block).subarray(offset, offset + bytes)
  }

  #viewOf(block: HostBlock): Uint8Array {
    const known = this.#views.get(block.pointer)
    if (known !== undefined) return known
    const view = viewMemory(block.pointer, block.bytes)
    this.#views.set(block.pointer, view)
    return view
  }

  /** Read-only this.#zeros: the state before the first step. The system backs memory that nobody has written with one page of them. */
  #zeroMemory(bytes: number): Pointer {
    if (this.#zeros.byteLength < bytes) this.#zeros = new Uint8Array(bytes)
    return this.#runtime.addressOf(this.#zeros)
  }

  forget(pointer: Pointer): void {
    this.#views.delete(pointer)
  }

  close(): void {
    for (const program of this.#programs.values()) this.#release(program)
    this.#runtime.close()
  }
}

// Elementwise kernels go through a large tensor in slices: their intermediates then stay small and in the cache.
function slices(task: Task): Task[] {
  const [elements, ...rest] = task.dims
  if (rest.length > 0 || elements <= SLICE_ELEMENTS) return [task]
  const count = Math.ceil(elements / SLICE_ELEMENTS)
  return Array.from({ length: count }, (_, i) => ({
    ...task,
    dims: [Math.min(SLICE_ELEMENTS, elements - i * SLICE_ELEMENTS)],
    offset: task.offset + i * SLICE_ELEMENTS,
  }))
}

function scalarValue(job: Job, task: Task, name: string): number {
  if (name === 'output_scale' && task.output_scale !== undefined) return task.output_scale
  return scalarOf(job, name)
}
