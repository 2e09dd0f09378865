import { DTYPES, type Dtype } from '../../../kernels/dtype.js'
import { type KernelSpec, kernelIo, kernelKey, type StateIo } from '../../../kernels/kernel.js'
import { buildKernel } from '../../../kernels/model.js'
import type { Task } from '../../optimizer/plan.js'
import { Cache } from '../cache.js'
import { createScanner } from '../cpu/scan.js'
import type { Executor, Scratch } from '../executor.js'
import { type Job, type JobResult, type Need, SLICE_ELEMENTS, scalarOf } from '../job.js'
import { type Span, Views } from '../region.js'
import { type OnnxRuntime, type Pointer, type Session, type SessionTarget, viewMemory } from './onnxruntime.js'

/** The memory in which the tensors of a lane lie while it computes. */
export type TensorSpace = {
  readonly target: SessionTarget
  /** Brings a gradient there, and answers its address. */
  receive(gradient: Span): Pointer
  /** The address where sessions write an update. */
  updateOf(update: Span): Pointer
  /** Returns once the update, which sessions have written there, lies in its own memory. */
  send(update: Span): void
  /** Returns once the host sees the checks that a session has written. */
  wait(): void
  /** The address of `bytes` zeros, which are the state before the first step. */
  zeros(bytes: number): Pointer
  /** Sets the lane's scratch memory aside. */
  load(scratch: Scratch | undefined): void
  close(): void
}

const FLOAT32 = DTYPES.float32
// A step frame may change the coefficients and with them the graph: the least recently used session makes room.
const MAX_PROGRAMS = 64

/** A job, with the addresses where sessions read its gradient and write its update. */
type JobInSpace = Job & { memory: { gradient: Pointer; update: Pointer } }

/** A kernel's session, with a tensor of its own for each scalar input and for each check. */
type Program = {
  session: Session
  spec: KernelSpec
  states: readonly StateIo[]
  scalars: (ScalarTensor & { name: string })[]
  checks: ScalarTensor[]
}

/** The keys of kernels that were met before. */
type Keys = Map<KernelSpec, string>

/** The part of a tensor that one run of a session works on; `offset` in elements. */
type TensorPart = { dims: readonly number[]; offset: number; dtype: Dtype }

/** One float32 in native memory: ONNX Runtime keeps its address, so it must never move. */
type ScalarTensor = { value: Float32Array; tensor: Pointer; pointer: Pointer }

/** Computes jobs with ONNX Runtime alone, one at a time. Gradients and updates are scanned in host memory. */
export class OnnxExecutor implements Executor {
  readonly #space: TensorSpace
  readonly #runtime: OnnxRuntime
  readonly #half: boolean
  readonly #scanner = createScanner()
  readonly #programs = new Cache<Program>(MAX_PROGRAMS, (program) => this.#release(program))
  readonly #views = new Views()

  /** With `half` matrix products are of float16. */
  constructor(runtime: OnnxRuntime, space: TensorSpace, { half }: { half: boolean }) {
    this.#space = space
    this.#half = half
    this.#runtime = runtime
  }

  load(needs: readonly Need[], scratch?: Scratch): void {
    this.#space.load(scratch)
    for (const { kernel } of needs) this.#program(kernel)
  }

  run(jobs: readonly Job[]): JobResult[] {
    // Jobs of one message, and the tasks of a plan, have few kernels: the key of each is made once.
    const keys = new Map<KernelSpec, string>()
    return jobs.map((job) => this.#run(job, keys))
  }

  #run(job: Job, keys: Keys): JobResult {
    const started = performance.now()
    if (job.source) this.#views.of(job.gradient).set(this.#views.of(job.source))
    const gradient = this.#scanner.scan(this.#views.of(job.gradient), job.plan.kernel.gradient_dtype)
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
    if (!gradient.finite || !this.#computeTasks(job, keys)) return finish('not_finite')
    const update = this.#scanner.scan(this.#views.of(job.update), job.plan.kernel.update_dtype)
    if (!update.finite) return finish('not_finite')
    result.updateFingerprint = update.fingerprint
    result.updateSquare = update.squareSum
    return finish('computed')
  }

  /** Runs every task of the plan; false once a check says that the next state is not finite. */
  #computeTasks(job: Job, keys: Keys): boolean {
    const memory = { gradient: this.#space.receive(job.gradient), update: this.#space.updateOf(job.update) }
    const finite = job.plan.tasks.flatMap(slices).every((task) => {
      const spec = task.kernel ?? job.plan.kernel
      const key = keys.get(spec) ?? kernelKey(spec)
      keys.set(spec, key)
      return this.#computeTask({ ...job, memory }, task, this.#program(spec, key))
    })
    if (finite) this.#space.send(job.update)
    return finite
  }

  #computeTask(job: JobInSpace, task: Task, { session, spec, states, scalars, checks }: Program): boolean {
    for (const scalar of scalars) scalar.value[0] = scalarValue(job, task, scalar.name)
    // Zeros come first: nothing has to be released yet if there is no memory for them.
    const zero = job.state ? 0n : this.#space.zeros(count(task.dims) * FLOAT32.bytes)
    const { dims, offset } = task
    const parts = states.map((io) => statePart(task, io))
    const gradient = this.#tensor(job.memory.gradient, { dims, offset, dtype: spec.gradient_dtype })
    const state = parts.map((part, i) =>
      job.state ? this.#tensor(job.state[i], part) : this.#tensor(zero, { ...part, offset: 0 }),
    )
    const next = parts.map((part, i) => this.#tensor(job.next[i], part))
    const data = this.#tensor(job.memory.update, { dims, offset, dtype: spec.update_dtype })
    try {
      const inputs = [gradient, ...state, ...scalars.map((scalar) => scalar.tensor)]
      this.#runtime.run(session, inputs, [...next, data, ...checks.map((check) => check.tensor)])
      this.#space.wait()
    } finally {
      for (const value of [gradient, ...state, ...next, data]) this.#runtime.releaseTensor(value)
    }
    return checks.every((check) => Number.isFinite(check.value[0]))
  }

  get #gpu(): number | undefined {
    const { target } = this.#space
    /* c8 ignore next -- needs a GPU: npm run test:gpu */
    return 'gpu' in target ? target.gpu : undefined
  }

  #tensor(base: Pointer, { dims, offset, dtype }: TensorPart): Pointer {
    const { bytes, onnx } = DTYPES[dtype]
    const memory = { pointer: base + BigInt(offset * bytes), bytes: count(dims) * bytes, gpu: this.#gpu }
    return this.#runtime.createTensor(memory, dims, onnx)
  }

  #program(spec: KernelSpec, key = kernelKey(spec)): Program {
    return this.#programs.get(key, () => this.#makeProgram(spec))
  }

  #release({ session, scalars, checks }: Program): void {
    this.#runtime.releaseSession(session)
    for (const { tensor, pointer } of [...scalars, ...checks]) {
      this.#runtime.releaseTensor(tensor)
      this.#runtime.free(pointer)
    }
  }

  #makeProgram(spec: KernelSpec): Program {
    const { state: states, scalars, checks } = kernelIo(spec)
    const names = {
      inputs: ['gradient', ...states.map(({ name }) => name), ...scalars],
      outputs: [...states.map(({ name }) => `${name}_next`), 'data', ...checks],
    }
    const session = this.#runtime.createSession(buildKernel(spec, { half: this.#half }), names, this.#space.target)
    return {
      session,
      spec,
      states,
      scalars: scalars.map((name) => ({ name, ...this.#scalarTensor([1]) })),
      checks: checks.map(() => this.#scalarTensor([])),
    }
  }

  #scalarTensor(dims: readonly number[]): ScalarTensor {
    const pointer = this.#runtime.allocate(4)
    const value = new Float32Array(viewMemory(pointer, 4).buffer)
    return { value, pointer, tensor: this.#runtime.createTensor({ pointer, bytes: 4 }, dims, FLOAT32.onnx) }
  }

  forget(pointer: Pointer): void {
    this.#views.forget(pointer)
  }

  close(): void {
    this.#programs.clear()
    this.#space.close()
    this.#runtime.close()
  }
}

// Elementwise kernels go through a large tensor in slices, so that their intermediates stay in the cache.
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

/** The part of a state tensor that belongs to a task: its elements, or the numbers of its rows or columns. */
function statePart({ dims, offset, line_offset = 0 }: Task, { dtype, per }: StateIo): TensorPart {
  if (per === 'element') return { dims, offset, dtype }
  const [rows, cols] = dims
  return { dims: per === 'row' ? [rows, 1] : [1, cols], offset: line_offset, dtype }
}

function count(dims: readonly number[]): number {
  return dims.reduce((product, dim) => product * dim, 1)
}

function scalarValue(job: Job, task: Task, name: string): number {
  if (name === 'output_scale' && task.output_scale !== undefined) return task.output_scale
  return scalarOf(job, name)
}
