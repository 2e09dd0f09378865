import { Worker } from 'node:worker_threads'
import { ServiceError } from '../../errors.js'
import type { LaneOptions, LaneReply, LaneRequest, Scratch } from '../executor.js'
import type { GroupLimit, JobResult, Need, Request } from '../job.js'
import type { Pointer } from '../onnx/onnxruntime.js'
import { packJobs, unpackResults } from './packed-jobs.js'
import { Queue } from './queue.js'

/** By its ticket a job is cancelled, as long as no lane has it. */
export type Ticket = { cancelled: boolean }

/** A request that a lane has not answered yet. */
type OpenRequest = { resolve: (results: readonly JobResult[]) => void; reject: (error: unknown) => void }

/**
 * A job in the queue. Exactly one of `computed` and `failed` is called, once, and neither throws: a promise for each of
 * many small jobs would take longer than the job.
 */
export type Queued = {
  readonly ticket: Ticket
  /** Makes the request when a lane is free; undefined where it is not wanted any more. */
  make(): Request | undefined
  /** With undefined where the ticket was cancelled or nothing was made. */
  computed(result: JobResult | undefined): void
  failed(error: unknown): void
}

/** Jobs that a lane is given together, and what they ask for. */
type Group = { readonly jobs: readonly Queued[]; readonly requests: readonly Request[] }

type Lane = { worker: Worker; busy: Map<number, OpenRequest>; groups: number; exited: Promise<void> }

// One group computes and one waits in the lane's port, so that a lane never idles for a turn of the event loop.
export const GROUPS_PER_LANE = 2
// Fewer jobs than these are not shared out among lanes: together they cost fewer messages and fewer launches.
const LEAST_TOGETHER = 4
// A lane's error arrives as text: only its words tell a lack of memory from other failures.
const OUT_OF_MEMORY =
  /failed to allocate memory|bad_alloc|CUDA_ERROR_OUT_OF_MEMORY|array length|array buffer allocation failed/i

/** The worker threads that compute on one unit of a device, and the queue of jobs before them. */
export class Lanes {
  readonly #fail: (error: Error) => void
  readonly #lanes: Lane[]
  readonly #limit: GroupLimit
  /** A group is full when its gradients have so many bytes. */
  #full: number
  readonly #queue = new Queue<Queued>()
  #nextId = 1
  #failure: ServiceError | undefined
  #dispatching = false

  /** `fail` is called with each error that is no lack of memory. After `refuse` no job is computed any more. */
  constructor({ lane, group }: { lane: LaneOptions; group: GroupLimit }, count: number, fail: (error: Error) => void) {
    this.#fail = fail
    this.#limit = group
    this.#full = group.bytes
    this.#lanes = Array.from({ length: count }, () => this.#start(lane))
  }

  get count(): number {
    return this.#lanes.length
  }

  /** Has every lane prepare the kernels and set the scratch memory aside. */
  async load(needs: readonly Need[], scratch?: Scratch): Promise<void> {
    if (this.#failure) throw this.#failure
    // While the lanes' memory changes, groups are those that fit into the least of it.
    /* c8 ignore next -- needs a GPU: npm run test:gpu */
    if (scratch) this.#full = Math.min(this.#full, scratch.full)
    await Promise.all(this.#lanes.map((lane) => this.#ask(lane, (id) => ({ type: 'load', id, needs, scratch }))))
    /* c8 ignore next -- needs a GPU: npm run test:gpu */
    if (scratch) this.#full = scratch.full
  }

  /** Computes in the order of the calls. */
  enqueue(job: Queued): void {
    if (this.#failure) return job.failed(this.#failure)
    this.#queue.push(job)
    this.#dispatch()
  }

  /** Computes as `enqueue` does; undefined where the ticket was cancelled or `make` answered undefined. */
  run(make: () => Request | undefined, ticket: Ticket): Promise<JobResult | undefined> {
    return new Promise((computed, failed) => this.enqueue({ make, ticket, computed, failed }))
  }

  /** Has every lane drop its view of the allocation at this address. */
  forget(pointer: Pointer): void {
    for (const lane of this.#lanes) this.#post(lane, { type: 'forget', pointer })
  }

  /** Rejects every job that was not answered yet, and all later ones. */
  refuse(failure: ServiceError): void {
    this.#failure = failure
    for (const lane of this.#lanes) for (const request of lane.busy.values()) request.reject(failure)
    for (const queued of this.#queue.drain()) queued.failed(failure)
  }

  /** Ends the lanes after the jobs that they were given; jobs in the queue are dropped, their results undefined. */
  async close(): Promise<void> {
    for (const queued of this.#queue.drain()) queued.computed(undefined)
    for (const lane of this.#lanes) this.#post(lane, { type: 'stop' })
    await Promise.all(this.#lanes.map((lane) => lane.exited))
  }

  // Jobs that are asked for in one turn of the event loop can share a group. A microtask would be too early: those of
  // one frame come one after the other, each in a microtask of its own.
  #dispatch(): void {
    if (this.#dispatching) return
    this.#dispatching = true
    setImmediate(() => {
      this.#dispatching = false
      this.#give()
    })
  }

  #give(): void {
    // What waits is shared out, so that no lane idles while another has all of it.
    const share = Math.max(LEAST_TOGETHER, Math.ceil(this.#queue.length / this.#lanes.length))
    while (this.#queue.length > 0) {
      const lane = this.#lanes.reduce((least, other) => (other.groups < least.groups ? other : least))
      if (lane.groups >= GROUPS_PER_LANE) return
      const group = this.#take(Math.min(share, this.#limit.jobs))
      if (group.jobs.length > 0) this.#send(lane, group)
    }
  }

  /** Makes the next jobs of one group, at most `most`; cancelled and undefined ones are left out. */
  #take(most: number): Group {
    const jobs: Queued[] = []
    const requests: Request[] = []
    let bytes = 0
    while (jobs.length < most && (bytes < this.#full || jobs.length === 0)) {
      const next = this.#queue.shift()
      if (next === undefined) break
      const made = make(next)
      if (made === undefined) continue
      jobs.push(next)
      requests.push(made)
      bytes += made.gradient.bytes
    }
    return { jobs, requests }
  }

  #send(lane: Lane, group: Group): void {
    lane.groups += 1
    const jobs = packJobs(group.requests)
    this.#ask(lane, (id) => ({ type: 'run', id, jobs }))
      .then((results) => {
        for (const [i, job] of group.jobs.entries()) job.computed(results[i])
      })
      .catch((error) => this.#refuseGroup(lane, group, error))
      .finally(() => {
        lane.groups -= 1
        this.#dispatch()
      })
  }

  // Jobs that lack memory together are tried one by one, so that only the run with too large a job is refused.
  #refuseGroup(lane: Lane, { jobs, requests }: Group, error: unknown): void {
    const together = jobs.length > 1 && error instanceof ServiceError && error.code === 'OVER_CAPACITY'
    for (const [i, job] of jobs.entries()) {
      if (together) this.#send(lane, { jobs: [job], requests: [requests[i]] })
      else job.failed(error)
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
    const request = lane.busy.get(reply.id)
    lane.busy.delete(reply.id)
    if ('results' in reply) return request?.resolve(unpackResults(reply.results))
    // A lane that lacks memory has changed nothing: only the run that asked is refused, and the device goes on.
    if (OUT_OF_MEMORY.test(reply.error)) return request?.reject(new ServiceError('OVER_CAPACITY', reply.error))
    this.#fail(new Error(reply.error))
    request?.reject(this.#failure)
  }
}

/** Makes a job; undefined where its ticket was cancelled, it is not wanted any more, or making it failed. */
function make(job: Queued): Request | undefined {
  try {
    const made = job.ticket.cancelled ? undefined : job.make()
    if (made === undefined) job.computed(undefined)
    return made
  } catch (error) {
    job.failed(refusalOf(error))
    return undefined
  }
}

/** OVER_CAPACITY for a lack of memory, which concerns the run that asked for it and no other; else the error itself. */
export function refusalOf(error: unknown): unknown {
  return OUT_OF_MEMORY.test(String(error)) ? new ServiceError('OVER_CAPACITY', String(error)) : error
}
