import assert from 'node:assert'
import type { KernelSpec } from '../../kernels/kernel.js'
import { expandCoefficients, NAMED_COEFFICIENTS } from '../../kernels/orthogonalize/coefficients.js'
import { ServiceError } from '../errors.js'
import type { Task } from '../optimizer/plan.js'
import type { Mapping } from '../wire/shared-memory.js'
import { Admission, type Grant } from './admission.js'
import { type Backend, type BackendOptions, openBackend } from './backend.js'
import { largestOf, scratchFor } from './cuda/scratch.js'
import { type Demand, type JobResult, needsOf, type Request } from './job.js'
import { Lanes, type Queued, refusalOf, type Ticket } from './lanes/lanes.js'
import { StateMemory, type Tensor } from './memory.js'
import type { Pointer } from './onnx/onnxruntime.js'
import { Region, Views, wholeOf } from './region.js'
import { RunStaging } from './run-staging.js'
import { Staging } from './staging.js'
import { openStateAccess, type StateAccess, type StateLocation } from './state-access.js'

export type { Queued, Ticket } from './lanes/lanes.js'

export type DeviceOptions = BackendOptions & {
  /** Bytes of the arena that gradients are received into. */
  staging_bytes: number
  /** Bytes that the runs' state and updates may take on each unit; 0: as many as the backend has. */
  state_bytes_limit: number
}

/** Memory that another process shares, and the unit whose GPU it is on. */
export type SharedRegion = { region: Region; unit: number }

// An update waits for its client longer than a gradient for a lane. Pages that no update touches take no memory.
const UPDATES_PER_STAGING = 2
// Copying this many bytes takes a fraction of a millisecond.
const READ_BYTES = 1 << 20
// Each tensor costs more than a microsecond, however small it is.
const READ_TENSORS = 2048

const { coefficients, ns_steps } = NAMED_COEFFICIENTS.keller_jordan
const DTYPES = { gradient_dtype: 'float32', update_dtype: 'float32' } as const
// A matrix of 64 or fewer rows would leave out the matrix products on a GPU, whose first run takes longest.
const WARM_UP: readonly Demand[] = [
  demand(
    { kind: 'muon', coefficients: expandCoefficients(coefficients, ns_steps), tall: false, ...DTYPES },
    { dims: [128, 128], offset: 0 },
  ),
  demand({ kind: 'sgd', ...DTYPES }, { dims: [64], offset: 0 }),
]

/**
 * Computes jobs: the lanes, the staging arena and the state memory. It is the only owner of device memory. A device has
 * one or more units (the CPU, or GPUs); a parameter's state and its jobs stay on one of them.
 */
export class Device {
  readonly backend: Backend
  readonly memory: StateMemory
  readonly staging: Staging
  /** Bytes that runs may have on each unit. */
  readonly stateBytesLimits: readonly number[]
  /** The reason why the device has failed, once it has: later jobs are refused with it. */
  failed: Error | undefined
  /** Called once when the device fails. */
  onFailure: (error: Error) => void = () => {}
  /** The arena of updates: warm memory that is used again and again. */
  readonly #updates: Staging
  readonly #admission: Admission
  #lanes: Lanes[]
  /** The event loop's access to each unit's state, opened when it is first needed. */
  #accesses: StateAccess[] = []
  readonly #views = new Views()

  private constructor(backend: Backend, options: DeviceOptions) {
    this.backend = backend
    this.memory = new StateMemory(backend.units)
    this.staging = new Staging(this.allocateHost(options.staging_bytes))
    this.#updates = new Staging(this.allocateHost(UPDATES_PER_STAGING * options.staging_bytes))
    this.stateBytesLimits = backend.units.map(({ stateBytes }) => options.state_bytes_limit || stateBytes)
    const units = backend.units.map(({ name, kernels }, unit) => ({
      name,
      kernels,
      bytes: this.stateBytesLimits[unit],
    }))
    const { lanes, group, hostBytes } = backend
    this.#admission = new Admission({ units, lanes, group, hostBytes })
    this.#lanes = backend.units.map(({ lane }) => {
      return new Lanes({ lane, group: backend.group }, backend.lanes, (error) => this.#fail(error))
    })
  }

  /** Starts every lane and has each compute once. Throws an Error that says what is missing. */
  static async start(options: DeviceOptions): Promise<Device> {
    const device = new Device(openBackend(options), options)
    try {
      await device.#warmUp()
      return device
    } catch (error) {
      await device.close()
      throw error
    }
  }

  /** The parts of this device that decide the bits of a result. */
  get record(): { kind: string; name: string; onnxruntime: string; processor: string } {
    const { kind, name, version, processor } = this.backend
    return { kind, name, onnxruntime: version, processor }
  }

  /** Where each unit's state lies, as plain data, which another thread can be sent. */
  get locations(): StateLocation[] {
    return this.backend.units.map(({ location }) => location)
  }

  /** The number of lanes of all units. */
  get lanes(): number {
    return this.#lanes.reduce((sum, { count }) => sum + count, 0)
  }

  get admittedBytes(): number {
    return this.#admission.bytes
  }

  /** Bytes that runs may have on all units. */
  get stateBytesLimit(): number {
    return total(this.stateBytesLimits)
  }

  /** Grants a run the memory that its parameters demand, or refuses with OVER_CAPACITY and the numbers. */
  admit(demands: readonly Demand[], what: string): Grant {
    const grant = this.#admission.admit(demands, what)
    this.memory.keep(this.#admission.largestState)
    return grant
  }

  /** Throws what `admit` would if the runs with the grants `leaving` had left. */
  checkAdmission(leaving: ReadonlySet<Grant>, demands: readonly Demand[], what: string): void {
    this.#admission.checkWithout(leaving, demands, what)
  }

  /** Grants state memory beside the runs', `bytes[i]` of unit i, as `admit` does. */
  reserve(bytes: readonly number[], what: string): Grant {
    return this.#admission.reserve(bytes, what)
  }

  /** Grants memory of the host beside the runs', and what jobs of such `demands` need of a lane, as `admit` does. */
  reserveHost(bytes: number, what: string, demands: readonly Demand[] = []): Grant {
    return this.#admission.reserveHost(bytes, what, demands)
  }

  dismiss(grant: Grant): void {
    this.#admission.dismiss(grant)
    this.memory.keep(this.#admission.largestState)
    this.memory.trim()
  }

  /**
   * Allocates memory that host and device share (page-locked where the device asks for it), not cleared. Its last
   * release frees it: no socket and no job of a lane may use its bytes any more.
   */
  allocateHost(bytes: number): Region {
    const pointer = this.#allocate(bytes)
    return new Region(wholeOf({ pointer, bytes }, 'host'), this.#views, () => {
      this.#forget(pointer)
      this.backend.host.free(pointer)
    })
  }

  /**
   * Maps memory that another process shares as memory of the host, locked for the GPUs. Its last release unmaps it.
   */
  shareHost({ pointer, bytes, unmap }: Mapping): SharedRegion {
    const { sharing } = this.backend
    try {
      /* c8 ignore start -- needs a GPU: npm run test:gpu */
      sharing?.lock(pointer, bytes)
    } catch (error) {
      unmap()
      throw error
    }
    /* c8 ignore stop */
    const free = () => {
      this.#forget(pointer)
      /* c8 ignore next -- needs a GPU: npm run test:gpu */
      sharing?.unlock(pointer)
      unmap()
    }
    return { region: new Region(wholeOf({ pointer, bytes }, 'host', true), this.#views, free), unit: 0 }
  }

  /* c8 ignore start -- needs a GPU: npm run test:gpu */
  /** Opens memory of a unit's GPU that another process has exported. Its last release closes it. */
  shareGpu(unit: number, handle: Uint8Array): SharedRegion {
    const { sharing } = this.backend
    assert(sharing, 'a device that finds the unit of a GPU shares its memory')
    const { pointer, bytes, unmap } = sharing.open(unit, handle)
    return { region: new Region(wholeOf({ pointer, bytes }, 'gpu', true), this.#views, unmap), unit }
  }
  /* c8 ignore stop */

  /** Whether a lane computes on a copy that it makes of memory that clients share; else `Job.source` has it copied. */
  get copiesShared(): boolean {
    return this.backend.sharing !== undefined
  }

  /** Copies the first bytes of memory that a client shares, which is the host's or that of a unit's GPU. */
  readShared({ region, unit }: SharedRegion, bytes: number): Uint8Array {
    /* c8 ignore next -- needs a GPU: npm run test:gpu */
    if (region.space === 'gpu') return this.#readGpu(unit, region.pointer, bytes)
    return region.chunk(0, bytes).slice()
  }

  /** Writes the first bytes of memory that a client shares. */
  writeShared({ region, unit }: SharedRegion, bytes: Uint8Array): void {
    /* c8 ignore next -- needs a GPU: npm run test:gpu */
    if (region.space === 'gpu') return this.#access(unit).write(region.pointer, bytes)
    region.chunk(0, bytes.length).set(bytes)
  }

  /** The memory that the gradients of a run are received into, which was granted it. */
  stagingOf({ gradientBytes }: Grant): RunStaging {
    return new RunStaging(this.staging, { bytes: gradientBytes, allocate: (bytes) => this.allocateHost(bytes) })
  }

  /** Memory for one update: of the arena, or an allocation of its own while clients that read slowly fill the arena. */
  takeUpdate(bytes: number): Region {
    return this.#updates.tryReserve(bytes) ?? this.allocateHost(bytes)
  }

  /**
   * Copies of the bytes of state tensors, one behind the other, in pieces of READ_BYTES: a stream takes longer for a
   * small piece than to copy it. The last piece of each READ_TENSORS tensors has less. The event loop can turn in
   * between. The caller has references.
   */
  *read(tensors: readonly Tensor[]): Generator<Uint8Array<ArrayBuffer>> {
    for (let at = 0; at < tensors.length; at += READ_TENSORS) yield* this.#readFew(tensors.slice(at, at + READ_TENSORS))
  }

  /** At most READ_TENSORS tensors, in pieces of READ_BYTES. */
  *#readFew(tensors: readonly Tensor[]): Generator<Uint8Array<ArrayBuffer>> {
    let rest = total(tensors.map(({ bytes }) => bytes))
    let piece = new Uint8Array(Math.min(rest, READ_BYTES))
    let filled = 0
    for (const { unit, pointer, bytes } of tensors) {
      for (let offset = 0; offset < bytes; ) {
        const part = piece.subarray(filled, filled + bytes - offset)
        this.backend.units[unit].read(pointer + BigInt(offset), part)
        offset += part.length
        filled += part.length
        if (filled < piece.length) continue
        yield piece
        rest -= filled
        piece = new Uint8Array(Math.min(rest, READ_BYTES))
        filled = 0
      }
    }
  }

  /** Writes into a state tensor that no job and no other reader has yet. */
  write({ unit, pointer }: Tensor, offset: number, source: Uint8Array): void {
    this.#access(unit).write(pointer + BigInt(offset), source)
  }

  /** Makes every lane ready for parameters that were admitted, so that no step waits for a kernel to be built. */
  async load(demands: readonly Demand[]): Promise<void> {
    const needs = needsOf(demands)
    await Promise.all(this.#lanes.map((lanes, unit) => lanes.load(needs, this.#admission.scratch(unit))))
  }

  /** Computes on a unit, in the order of the calls. */
  enqueue(job: Queued, unit = 0): void {
    this.#lanes[unit].enqueue(job)
  }

  /** Computes as `enqueue` does: `make` is called when a lane is free. */
  run(make: () => Request | undefined, ticket: Ticket, unit = 0): Promise<JobResult | undefined> {
    return this.#lanes[unit].run(make, ticket)
  }

  /** Ends the lanes after the jobs that they were given; jobs in the queue are dropped, their results undefined. */
  async close(): Promise<void> {
    await Promise.all(this.#lanes.map((lanes) => lanes.close()))
    for (const access of Object.values(this.#accesses)) access.close()
    this.backend.close()
  }

  /* c8 ignore start -- needs a GPU: npm run test:gpu */
  #readGpu(unit: number, pointer: Pointer, bytes: number): Uint8Array {
    const copy = new Uint8Array(bytes)
    this.backend.units[unit].read(pointer, copy)
    return copy
  }
  /* c8 ignore stop */

  #access(unit: number): StateAccess {
    this.#accesses[unit] ??= openStateAccess(this.backend.units[unit].location)
    return this.#accesses[unit]
  }

  /** Drops every thread's view of an allocation that is about to go. */
  #forget(pointer: Pointer): void {
    this.#views.forget(pointer)
    for (const lanes of this.#lanes) lanes.forget(pointer)
  }

  #allocate(bytes: number): Pointer {
    try {
      return this.backend.host.allocate(bytes)
    } catch (error) {
      throw refusalOf(error)
    }
  }

  async #warmUp(): Promise<void> {
    const { units, group } = this.backend
    /* c8 ignore next -- needs a GPU: npm run test:gpu */
    const scratch = units.map(({ kernels }) => kernels && scratchFor(largestOf(WARM_UP, kernels), group))
    await Promise.all(this.#lanes.map((lanes, unit) => lanes.load(needsOf(WARM_UP), scratch[unit])))
  }

  #fail(error: Error): void {
    if (this.failed) return
    this.failed = error
    const failure = new ServiceError('DEVICE_FAILED', `the device ${this.backend.name} has failed: ${error.message}`)
    for (const lanes of this.#lanes) lanes.refuse(failure)
    this.onFailure(error)
  }
}

function demand(kernel: KernelSpec, task: Task): Demand {
  const plan = { kernel, tasks: [task], scalars: { output_scale: 1 }, scale: 1, decay: 0, rms_factor: 1 }
  const bytes = task.dims.reduce((product, dim) => product * dim, 4)
  return { plan, gradient_bytes: bytes, update_bytes: bytes, state_bytes: bytes }
}

function total(numbers: readonly number[]): number {
  return numbers.reduce((sum, number) => sum + number, 0)
}
