import { Worker } from 'node:worker_threads'
import { ServiceError } from '../errors.js'
import type { Scratch } from './cuda/cuda-layout.js'
import type { Job, JobGroup, JobResult, LaneReply, LaneRequest, Need } from './job.js'
import type { LaneOptions } from './lane.js'
import type { Pointer } from './onnx/onnxruntime.js'

/** A job that waits for a lane. Cancelled before that it costs nothing. */
export type Ticket = { cancelled: boolean }

type Waiting = { resolve: (results: readonly JobResult[]) => void; reject: (error: unknown) => void }

type Pending = {
  job: () => Job | undefined
  ticket: Ticket
  resolve: (result: JobResult | undefined) => void
  reject: (error: unknown) => void
}

type Made = Pending & { made: Job }

type Lane = { worker: Worker; busy: Map<number, Waiting>; groups: number; exited: Promise<void> }

// One group computes and one waits in the lane's port, so that a lane never idles for a turn of the event loop.
export const GROUPS_PER_LANE = 2
// ONNX Runtime, CUDA and V8 tell them from other errors by their words only.
const OUT_OF_MEMORY =
  /failed to allocate memory|bad_alloc|CUDA_ERROR_OUT_OF_MEMORY|array length|array buffer allocation failed/i

/** The worker threads that compute on one unit of a device, and the queue before them. */
export class Lanes {
  readonly #fail: (error: Error) => void
  readonly #lanes: Lane[]
  readonly #group: JobGroup
  #queue: Pending[] = []
  #nextId = 1
  #failure: ServiceError | undefined
  #dispatching = false

  /** `fail` is told of the first error that is no lack of memory; nothing is computed any more after `refuse`. */
  constructor({ lane, group }: { lane: LaneOptions; group: JobGroup }, count: number, fail: (error: Error) => void) {
    this.#fail = fail
    this.#group = group
    this.#lanes = Array.from({ length: count }, () => this.#start(lane))
  }

  get count(): number {
    return this.#lanes.length
  }

  /** Makes every lane ready for what is needed. */
  async load(needs: readonly Need[], scratch?: Scratch): Promise<void> {
    if (this.#failure) throw this.#failure
    await Promise.all(this.#lanes.map((lane) => this.#ask(lane, (id) => ({ type: 'load', id, needs, scratch }))))
  }

  /** Computes in the order of the calls; undefined where the ticket was cancelled or no job was wanted any more. */
  run(job: () => Job | undefined, ticket: Ticket): Promise<JobResult | undefined> {
    if (this.#failure) return Promise.reject(this.#failure)
    return new Promise((resolve, reject) => {
      this.#queue.push({ job, ticket, resolve, reject })
      this.#dispatch()
    })
  }

  /** Has every lane drop its view of a host block. */
  forget(pointer: Pointer): void {
    for (const lane of this.#lanes) this.#post(lane, { type: 'forget', pointer })
  }

  /** Refuses everything that waits, and all that comes. */
  refuse(failure: ServiceError): void {
    this.#failure = failure
    for (const lane of this.#lanes) for (const waiting of lane.busy.values()) waiting.reject(failure)
    for (const pending of this.#queue.splice(0)) pending.reject(failure)
  }

  /** Ends the lanes after the jobs that they have; jobs that none has are dropped. */
  async close(): Promise<void> {
    for (const pending of this.#queue.splice(0)) pending.resolve(undefined)
    for (const lane of this.#lanes) this.#post(lane, { type: 'stop' })
    await Promise.all(this.#lanes.map((lane) => lane.exited))
  }

  // Jobs that are asked for in one turn of the event loop can share a group.
  #dispatch(): void {
    if (this.#dispatching) return
    this.#dispatching = true
    queueMicrotask(() => {
      this.#dispatching = false
      this.#give()
    })
  }

  #give(): void {
    while (this.#queue.length > 0) {
      const lane = this.#lanes.reduce((least, other) => (other.groups < least.groups ? other : least))
      if (lane.groups >= GROUPS_PER_LANE) return
      const group = this.#take()
      if (group.length > 0) this.#send(lane, group)
    }
  }

  /** The next jobs for one group; those that nobody wants any more are left out. */
  #take(): Made[] {
    const group: Made[] = []
    let bytes = 0
    while (group.length < this.#group.jobs && bytes < this.#group.bytes) {
      const next = this.#queue.shift()
      if (next === undefined) break
      const made = make(next)
      if (made === undefined) continue
      group.push({ ...next, made })
      bytes += made.gradient.bytes
    }
    return group
  }

  #send(lane: Lane, group: readonly Made[]): void {
    lane.groups += 1
    const jobs = group.map(({ made }) => made)
    this.#ask(lane, (id) => ({ type: 'run', id, jobs }))
      .then((results) => {
        for (const [i, { resolve }] of group.entries()) resolve(results[i])
      })
      .catch((error) => this.#refuseGroup(lane, group, error))
      .finally(() => {
        lane.groups -= 1
        this.#dispatch()
      })
  }

  // Jobs that lack memory together are tried one by one: what one run asks for is no other run's trouble.
  #refuseGroup(lane: Lane, group: readonly Made[], error: unknown): void {
    const together = group.length > 1 && error instanceof ServiceError && error.code === 'OVER_CAPACITY'
    for (const one of group) {
      if (together) this.#send(lane, [one])
      else one.reject(error)
    }
  }

  #ask(lane: Lane, request: (id: number) => LaneRequest): Promise<readonly JobResult[]> {
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      lane.busy.set(id, { resolve, reject })
      this.#post(lane, request(id))
    })
  }

  #post(lane: Lane, request: LaneRequest): void {
    lane.worker.postMessage(request)
  }

  #start(workerData: LaneOptions): Lane {
    // Modules that `--import` preloads (an agent, a test runner) are the service's: in each lane they would start anew.
    const worker = new Worker(new URL('./lane.js', import.meta.url), { workerData, execArgv: [] })
    const exited = new Promise<void>((resolve) => worker.once('exit', () => resolve()))
    const lane: Lane = { worker, busy: new Map(), groups: 0, exited }
    worker.on('message', (reply: LaneReply) => this.#receive(lane, reply))
    worker.on('error', (error) => this.#fail(error))
    return lane
  }

  #receive(lane: Lane, reply: LaneReply): void {
    const waiting = lane.busy.get(reply.id)
    lane.busy.delete(reply.id)
    if ('results' in reply) return waiting?.resolve(reply.results)
    // A lane that runs out of memory has changed nothing: it is that run's trouble alone.
    if (OUT_OF_MEMORY.test(reply.error)) return waiting?.reject(new ServiceError('OVER_CAPACITY', reply.error))
    this.#fail(new Error(reply.error))
    waiting?.reject(this.#failure)
  }
}

/** The job, or undefined: its ticket was cancelled, nobody wants it any more, or it cannot be made and is refused. */
function make({ job, ticket, resolve, reject }: Pending): Job | undefined {
  try {
    const made = ticket.cancelled ? undefined : job()
    if (made === undefined) resolve(undefined)
    return made
  } catch (error) {
    reject(told(error))
    return undefined
  }
}

/** What a failing call is told as: memory that cannot be had is the trouble of the run that asked for it, and of no other. */
export function told(error: unknown): unknown {
  return OUT_OF_MEMORY.test(String(error)) ? new ServiceError('OVER_CAPACITY', String(error)) : error
}
