import { parentPort, workerData } from 'node:worker_threads'
import { bytesPerElement, DTYPES, type Dtype } from '../../kernels/dtype.js'
import { buildKernel, KERNEL_IO, type KernelSpec, kernelKey } from '../../kernels/kernel.js'
import type { Task } from '../optimizer/plan.js'
import {
  type HostBlock,
  type HostRange,
  type Job,
  type JobResult,
  type LaneReply,
  type LaneRequest,
  SLICE_ELEMENTS,
} from './job.js'
import { openOnnxRuntime, type Pointer, type Session, viewMemory } from './onnxruntime.js'
import { createScanner } from './scan.js'

/** What a lane is started with: the folder of libonnxruntime and the threads of one session. */
export type LaneOptions = { folder: string; threads: number }

const FLOAT32 = DTYPES.float32
// A step frame may change the coefficients and with them the graph: the least recently used session makes room.
const MAX_PROGRAMS = 64

const { folder, threads } = workerData as LaneOptions
const runtime = openOnnxRuntime(folder)
const scanner = createScanner()
const programs = new Map<string, Program>()
const views = new Map<Pointer, Uint8Array>()
let zeros = new Uint8Array(0)

/** A kernel's session with one resident tensor for each scalar input and for each check that it answers. */
type Program = { session: Session; spec: KernelSpec; scalars: (Resident & { name: string })[]; checks: Resident[] }

/** One float32 of native memory: ONNX Runtime keeps its address, so it must never move. */
type Resident = { value: Float32Array; tensor: Pointer; pointer: Pointer }

parentPort?.on('message', (request: LaneRequest) => {
  const reply = handle(request)
  if (reply) parentPort?.postMessage(reply)
})

function handle(request: LaneRequest): LaneReply | undefined {
  switch (request.type) {
    case 'load':
      return answer(request.id, () => {
        for (const spec of request.kernels) program(spec)
        return undefined
      })
    case 'run':
      return answer(request.id, () => runJob(request.job))
    case 'forget':
      views.delete(request.pointer)
      return undefined
    case 'stop':
      return stop()
  }
}

function answer(id: number, work: () => JobResult | undefined): LaneReply {
  try {
    return { id, result: work() }
  } catch (error) {
    return { id, error: String(error).replace(/^\w*Error: /, '') }
  }
}

function runJob(job: Job): JobResult {
  const started = performance.now()
  const gradient = scanner.scan(bytesOf(job.gradient), job.plan.kernel.gradient_dtype)
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
  if (!gradient.finite || !computeTasks(job)) return finish('not_finite')
  const update = scanner.scan(bytesOf(job.update), job.plan.kernel.update_dtype)
  result.updateFingerprint = update.fingerprint
  result.updateSquare = update.squareSum
  return finish(update.finite ? 'computed' : 'not_finite')
}

/** Runs every task of the plan; false where a check says that the next state would not be finite. */
function computeTasks(job: Job): boolean {
  // A plan names few kernels and names them often: each is looked up once.
  const found = new Map<KernelSpec, Program>()
  return job.plan.tasks.flatMap(slices).every((task) => {
    const spec = task.kernel ?? job.plan.kernel
    const known = found.get(spec) ?? program(spec)
    found.set(spec, known)
    return computeTask(job, task, known)
  })
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

function computeTask(job: Job, task: Task, { session, spec, scalars, checks }: Program): boolean {
  for (const scalar of scalars) scalar.value[0] = scalarValue(job, task, scalar.name)
  const elements = task.dims.reduce((product, dim) => product * dim, 1)
  // Before anything that would have to be released if there is no memory for it.
  const zero = job.state ? 0n : zeroMemory(elements * 4)
  const tensor = (base: Pointer, dtype: Dtype): Pointer => {
    const size = bytesPerElement(dtype)
    const memory = { pointer: base + BigInt(task.offset * size), bytes: elements * size }
    return runtime.createTensor(memory, task.dims, DTYPES[dtype].onnx)
  }
  const zeroTensor = () => runtime.createTensor({ pointer: zero, bytes: elements * 4 }, task.dims, FLOAT32.onnx)
  const gradient = tensor(addressOf(job.gradient), spec.gradient_dtype)
  const state = KERNEL_IO[spec.kind].state.map((_, i) => (job.state ? tensor(job.state[i], 'float32') : zeroTensor()))
  const next = job.next.map((pointer) => tensor(pointer, 'float32'))
  const data = tensor(addressOf(job.update), spec.update_dtype)
  try {
    const inputs = [gradient, ...state, ...scalars.map((scalar) => scalar.tensor)]
    runtime.run(session, inputs, [...next, data, ...checks.map((check) => check.tensor)])
  } finally {
    for (const value of [gradient, ...state, ...next, data]) runtime.releaseTensor(value)
  }
  return checks.every((check) => Number.isFinite(check.value[0]))
}

function scalarValue(job: Job, task: Task, name: string): number {
  if (name === 'gradient_scale') return job.gradient_scale
  if (name === 'output_scale' && task.output_scale !== undefined) return task.output_scale
  const value = job.plan.scalars[name]
  if (value === undefined) throw new Error(`the plan gives no ${name}`)
  return value
}

function program(spec: KernelSpec): Program {
  const key = kernelKey(spec)
  const known = programs.get(key) ?? makeProgram(spec)
  // A Map keeps the order of insertion, so its first entry is the least recently used one.
  programs.delete(key)
  programs.set(key, known)
  if (programs.size > MAX_PROGRAMS) dropOldest()
  return known
}

function dropOldest(): void {
  const [oldest] = programs
  programs.delete(oldest[0])
  release(oldest[1])
}

function release({ session, scalars, checks }: Program): void {
  runtime.releaseSession(session)
  for (const { tensor, pointer } of [...scalars, ...checks]) {
    runtime.releaseTensor(tensor)
    runtime.free(pointer)
  }
}

function makeProgram(spec: KernelSpec): Program {
  const { state, scalars, checks } = KERNEL_IO[spec.kind]
  const names = {
    inputs: ['gradient', ...state, ...scalars],
    outputs: [...state.map((name) => `${name}_next`), 'data', ...checks],
  }
  const session = runtime.createSession(buildKernel(spec), names, threads)
  return {
    session,
    spec,
    scalars: scalars.map((name) => ({ name, ...resident([1]) })),
    checks: checks.map(() => resident([])),
  }
}

function resident(dims: readonly number[]): Resident {
  const pointer = runtime.allocate(4)
  const value = new Float32Array(viewMemory(pointer, 4).buffer)
  return { value, pointer, tensor: runtime.createTensor({ pointer, bytes: 4 }, dims, FLOAT32.onnx) }
}

function bytesOf({ block, offset, bytes }: HostRange): Uint8Array {
  return viewOf(block).subarray(offset, offset + bytes)
}

function viewOf(block: HostBlock): Uint8Array {
  const known = views.get(block.pointer)
  if (known !== undefined) return known
  const view = viewMemory(block.pointer, block.bytes)
  views.set(block.pointer, view)
  return view
}

function addressOf({ block, offset }: HostRange): Pointer {
  return block.pointer + BigInt(offset)
}

/** Read-only zeros: the state before the first step. The system backs memory that nobody has written with one page of them. */
function zeroMemory(bytes: number): Pointer {
  if (zeros.byteLength < bytes) zeros = new Uint8Array(bytes)
  return runtime.addressOf(zeros)
}

// The worker ends by itself once nothing listens: ending it from outside while a run is in flight would crash the process.
function stop(): undefined {
  for (const program of programs.values()) release(program)
  runtime.close()
  parentPort?.close()
}
