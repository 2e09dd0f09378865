import { Worker } from 'node:worker_threads'
import { ServiceError } from '../errors.js'
import type { Job, JobResult, LaneReply, LaneRequest, Need } from './job.js'
import type { LaneOptions } from './lane.js'
import type { Pointer } from './onnxruntime.js'

/** A job that waits for a lane. Cancelled before that it costs nothing. */
export type Ticket = { cancelled: boolean }

type Waiting = { resolve: (result: JobResult | undefined) => void; reject: (error: unknown) => void }
type Pending = Waiting & { job: () => Job | undefined; ticket: Ticket }
type Lane = { worker: Worker; busy: Map<number, Waiting>; jobs: number; exited: Promise<void> }

// One job computes and one waits in the lane's port, so that a lane never idles for a turn of the event loop.
const JOBS_PER_LANE = 2
// ONNX Runtime, CUDA and V8 tell them from other errors by their words only.
const OUT_OF_MEMORY =
  /failed to allocate memory|bad_alloc|CUDA_ERROR_OUT_OF_MEMORY|array length|array buffer allocation failed/i

/** The worker threads that compute on one unit of a device, and the queue before them. */
export class Lanes {
  readonly #fail: (error: Error) => void
  readonly #lanes: Lane[]
  #queue: Pending[] = []
  #nextId = 1
  #failure: ServiceError | undefined

  /** `fail` is told of the first error that is no lack of memory; nothing is computed any more after `refuse`. */
  constructor(options: LaneOptions, count: number, fail: (error: Error) => void) {
    this.#fail = fail
    this.#lanes = Array.from({ length: count }, () => this.#start(options))
  }

  get count(): number {
    return this.#lanes.length
  }

  /** Makes every lane ready for what is needed. */
  async load(needs: readonly Need[]): Promise<void> {
    if (this.#failure) throw this.#failure
    await Promise.all(this.#lanes.map((lane) => this.#ask(lane, (id) => ({ type: 'load', id, needs }))))
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

  #start(workerData: LaneOptions): Lane {
    const worker = new Worker(new URL('./lane.js', import.meta.url), { workerData })
    const exited = new Promise<void>((resolve) => worker.once('exit', () => resolve()))
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
    waiting?.reject(this.#failure)
  }
}

/** What a failing call is told as: memory that cannot be had is the trouble of the run that asked for it, and of no other. */
export function told(error: unknown): unknown {
  return OUT_OF_MEMORY.test(String(error)) ? new ServiceError('OVER_CAPACITY', String(error)) : error
}
