import { existsSync } from 'node:fs'
import { availableParallelism, totalmem } from 'node:os'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import type { KernelSpec } from '../../kernels/kernel.js'
import { ServiceError } from '../errors.js'
import type { HostBlock, HostRange, Job, JobResult, LaneReply, LaneRequest } from './job.js'
import type { LaneOptions } from './lane.js'
import { StateMemory, type Tensor } from './memory.js'
import { bundledLibraryFolder, type OnnxRuntime, openOnnxRuntime, type Pointer, viewMemory } from './onnxruntime.js'
import { Staging } from './staging.js'

export type DeviceOptions = {
  /** auto | cpu | cuda[:n] */
  device: string
  /** The folder of libonnxruntime; empty: the one inside onnxruntime-node. */
  onnxruntime_dir: string
  /** Worker threads that compute, and intra-op threads of each; 0: by the number of cores. */
  lanes: number
  threads: number
  /** Bytes of the arena that gradients are received into. */
  staging_bytes: number
  /** Bytes that the runs' state and updates may take together; 0: three quarters of the machine's memory. */
  state_bytes_limit: number
}

/** Where an update is computed and sent from; nothing may use `range` after `release`. */
export type UpdateMemory = { range: HostRange; release: () => void }

/** A job that waits for a lane. `plan` is called when it is dispatched: undefined drops it. */
export type Ticket = { cancelled: boolean }

type Pending = {
  job: () => Job | undefined
  ticket: Ticket
  resolve: (r: JobResult | undefined) => void
  reject: (e: unknown) => void
}
type Lane = {
  worker: Worker
  busy: Map<number, { resolve: (r: JobResult | undefined) => void; reject: (e: unknown) => void }>
  jobs: number
  exited: Promise<unknown>
}

const CUDA_FILES = ['libonnxruntime_providers_cuda.so', 'libonnxruntime_providers_shared.so']
// One job computes and one waits in the lane's port, so that a lane never idles for a turn of the event loop.
const JOBS_PER_LANE = 2
// Lanes on the CPU share its memory bandwidth and its arena of intermediates: more than four gain nothing.
const MAX_CPU_LANES = 4

// Updates wait for their client longer than gradients for a lane. What is never needed is never touched: it takes no memory.
const UPDATES_PER_STAGING = 2

// About a millisecond of copying.
const READ_BYTES = 4 << 20
// ONNX Runtime and V8 tell them from other errors by their words only.
const OUT_OF_MEMORY = /failed to allocate memory|bad_alloc|array length|array buffer allocation failed/i

/** Where plans run: lanes, the staging arena, state memory, and the queue before the lanes. The only owner of device memory. */
export class Device {
  /** Text for people, such as `cpu`. */
  readonly name = 'cpu'
  readonly kind = 'cpu'
  readonly version: string
  /** Why `auto` did not take a GPU; empty where nothing was left aside. */
  readonly note: string
  readonly memory: StateMemory
  readonly staging: Staging
  readonly stagingBlock: HostBlock
  /** Bytes granted to runs by `admit`, and how many there are in all. */
  admittedBytes = 0
  readonly stateBytesLimit: number
  /** Set once the device has failed; every later call is refused with it. */
  failed: Error | undefined
  /** Called once when the device fails. */
  onFailure: (error: Error) => void = () => {}
  #runtime: OnnxRuntime
  /** Where updates lie while there is room: the same warm memory again and again. */
  readonly #updates: Staging
  readonly #updatesBlock: HostBlock
  #lanes: Lane[]
  #queue: Pending[] = []
  #nextId = 1
  #views = new Map<bigint, Uint8Array<ArrayBuffer>>()

  private constructor(runtime: OnnxRuntime, options: Required<DeviceOptions> & LaneOptions, note: string) {
    this.#runtime = runtime
    this.version = runtime.version
    this.note = note
    this.memory = new StateMemory(runtime)
    this.staging = new Staging(options.staging_bytes)
    this.stagingBlock = this.allocateHost(options.staging_bytes)
    this.#updates = new Staging(UPDATES_PER_STAGING * options.staging_bytes)
    this.#updatesBlock = this.allocateHost(this.#updates.capacity)
    this.stateBytesLimit = options.state_bytes_limit
    this.#lanes = Array.from({ length: options.lanes }, () => this.#startLane(options))
  }

  /** Starts every lane and has each load a kernel; throws an Error that says what is missing. */
  static async start(options: DeviceOptions): Promise<Device> {
    const folder = options.onnxruntime_dir || bundledLibraryFolder()
    const runtime = openOnnxRuntime(folder)
    const note = chooseProvider(options.device, folder, runtime)
    const cores = availableParallelism()
    const lanes = options.lanes || Math.min(cores, MAX_CPU_LANES)
    const threads = options.threads || Math.max(1, Math.floor(cores / lanes))
    const state_bytes_limit = options.state_bytes_limit || Math.floor(totalmem() * 0.75)
    const device = new Device(runtime, { ...options, folder, lanes, threads, state_bytes_limit }, note)
    try {
      await device.load([{ kind: 'sgd', gradient_dtype: 'float32', update_dtype: 'float32' }])
      return device
    } catch (error) {
      await device.close()
      throw error
    }
  }

  get lanes(): number {
    return this.#lanes.length
  }

  /** Grants a run `bytes` of state and updates, or refuses with OVER_CAPACITY and the numbers. */
  admit(bytes: number, what: string): void {
    const left = this.stateBytesLimit - this.admittedBytes
    if (bytes > left)
      throw new ServiceError('OVER_CAPACITY', `${what} needs ${bytes} bytes of device memory, ${left} are left`)
    this.admittedBytes += bytes
  }

  dismiss(bytes: number): void {
    this.admittedBytes -= bytes
    this.memory.trim()
  }

  /** Memory that host and device share (page-locked where the device asks for it), not cleared. */
  allocateHost(bytes: number): HostBlock {
    try {
      return { pointer: this.#runtime.allocate(bytes), bytes }
    } catch (error) {
      throw told(error)
    }
  }

  /** Gives host memory back. Nothing may hold a view of it any more: not a socket, not a lane's job. */
  freeHost(pointer: Pointer): void {
    this.#views.delete(pointer)
    for (const lane of this.#lanes) this.#post(lane, { type: 'forget', pointer })
    this.#runtime.free(pointer)
  }

  /** Memory for one update. Clients that read slowly may hold the arena: then it gets memory of its own. */
  takeUpdate(bytes: number): UpdateMemory {
    const slot = this.#updates.tryReserve(bytes)
    if (slot) {
      const release = () => this.#updates.release(slot)
      return { range: { block: this.#updatesBlock, offset: slot.offset, bytes }, release }
    }
    const block = this.allocateHost(bytes)
    return { range: { block, offset: 0, bytes }, release: () => this.freeHost(block.pointer) }
  }

  /** The event loop's view of a host block. */
  view(block: HostBlock): Uint8Array<ArrayBuffer> {
    const known = this.#views.get(block.pointer)
    if (known !== undefined) return known
    const view = viewMemory(block.pointer, block.bytes)
    this.#views.set(block.pointer, view)
    return view
  }

  /** Copies of a state tensor's bytes, piece by piece: the event loop can turn in between. The caller holds a reference. */
  *read(tensor: Tensor): Generator<Uint8Array<ArrayBuffer>> {
    const view = viewMemory(tensor.pointer, tensor.bytes)
    for (let offset = 0; offset < tensor.bytes; offset += READ_BYTES) yield view.slice(offset, offset + READ_BYTES)
  }

  /** Builds the kernels' sessions in every lane, so that no step waits for them. */
  async load(kernels: readonly KernelSpec[]): Promise<void> {
    if (this.failed) throw this.#failure()
    await Promise.all(this.#lanes.map((lane) => this.#ask(lane, (id) => ({ type: 'load', id, kernels }))))
  }

  /**
   * Computes in the order of the calls. `job` is asked for when a lane is free, so a cancelled ticket or an undefined job
   * costs nothing; then the result is undefined.
   */
  run(job: () => Job | undefined, ticket: Ticket): Promise<JobResult | undefined> {
    if (this.failed) return Promise.reject(this.#failure())
    return new Promise((resolve, reject) => {
      this.#queue.push({ job, ticket, resolve, reject })
      this.#dispatch()
    })
  }

  /** Ends the lanes after the jobs that they have; jobs that none has are dropped. */
  async close(): Promise<void> {
    for (const pending of this.#queue.splice(0)) pending.resolve(undefined)
    for (const lane of this.#lanes) this.#post(lane, { type: 'stop' })
    await Promise.all(this.#lanes.map((lane) => lane.exited))
  }

  #dispatch(): void {
    for (;;) {
      const lane = this.#lanes.reduce((least, other) => (other.jobs < least.jobs ? other : least))
      if (lane.jobs >= JOBS_PER_LANE) return
      const next = this.#queue.shift()
      if (next === undefined) return
      this.#give(lane, next)
    }
  }

  #give(lane: Lane, { job, ticket, resolve, reject }: Pending): void {
    let made: Job | undefined
    try {
      made = ticket.cancelled ? undefined : job()
    } catch (error) {
      return reject(told(error))
    }
    if (made === undefined) return resolve(undefined)
    lane.jobs += 1
    this.#ask(lane, (id) => ({ type: 'run', id, job: made }))
      .then(resolve, reject)
      .finally(() => {
        lane.jobs -= 1
        this.#dispatch()
      })
  }

  #ask(lane: Lane, request: (id: number) => LaneRequest): Promise<JobResult | undefined> {
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      lane.busy.set(id, { resolve, reject })
      this.#post(lane, request(id))
    })
  }

  #post(lane: Lane, request: LaneRequest): void {
    lane.worker.postMessage(request)
  }

  #startLane(workerData: LaneOptions): Lane {
    const { folder, threads } = workerData
    const worker = new Worker(new URL('./lane.js', import.meta.url), { workerData: { folder, threads } })
    const exited = new Promise((resolve) => worker.once('exit', resolve))
    const lane: Lane = { worker, busy: new Map(), jobs: 0, exited }
    worker.on('message', (reply: LaneReply) => this.#receive(lane, reply))
    worker.on('error', (error) => this.#fail(error))
    return lane
  }

  #receive(lane: Lane, reply: LaneReply): void {
    const waiting = lane.busy.get(reply.id)
    lane.busy.delete(reply.id)
    if ('result' in reply) return waiting?.resolve(reply.result)
    // A lane that runs out of memory has changed nothing: it is that run's trouble alone.
    if (OUT_OF_MEMORY.test(reply.error)) return waiting?.reject(new ServiceError('OVER_CAPACITY', reply.error))
    this.#fail(new Error(reply.error))
    waiting?.reject(this.#failure())
  }

  #fail(error: Error): void {
    if (this.failed) return
    this.failed = error
    for (const lane of this.#lanes) for (const waiting of lane.busy.values()) waiting.reject(this.#failure())
    for (const pending of this.#queue.splice(0)) pending.reject(this.#failure())
    this.onFailure(error)
  }

  #failure(): ServiceError {
    return new ServiceError('DEVICE_FAILED', `the device ${this.name} has failed: ${this.failed?.message}`)
  }
}

/** What a failing call is told as: memory that cannot be had is the trouble of the run that asked for it, and of no other. */
function told(error: unknown): unknown {
  return OUT_OF_MEMORY.test(String(error)) ? new ServiceError('OVER_CAPACITY', String(error)) : error
}

/** Throws where `device` cannot be had; answers why `auto` settled for the CPU. */
function chooseProvider(device: string, folder: string, runtime: OnnxRuntime): string {
  if (device === 'cpu') return ''
  const missing = cudaProblem(folder, runtime)
  if (device === 'auto') return missing
  throw new Error(`device ${device} is not usable: ${missing}`)
}

// The library that npm ships names the CUDA provider among its own but does not carry its files: only the folder tells.
function cudaProblem(folder: string, { version }: OnnxRuntime): string {
  const absent = CUDA_FILES.filter((name) => !existsSync(join(folder, name)))
  if (absent.length === 0)
    return `ONNX Runtime ${version} in ${folder} has its CUDA provider, but this version of muond computes on the CPU only`
  const where = 'the Python wheel onnxruntime-gpu carries them in onnxruntime/capi'
  return `${folder} lacks ${absent.join(' and ')}: set MUOND_ONNXRUNTIME_DIR to a folder that holds them beside libonnxruntime of the same version (${where})`
}
