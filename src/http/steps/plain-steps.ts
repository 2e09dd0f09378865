import type { IncomingHttpHeaders } from 'node:http'
import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import type { Principal } from '../../access/principal.js'
import { ServiceError } from '../../errors.js'
import { Turns } from '../../keep/turns.js'
import { type AskedStep, type PlainMeans, PlainStep } from '../../link/plain/plain-step.js'
import { updateFile } from '../../link/plain/update-file.js'
import { paced } from '../pace.js'
import { refusal } from '../state-import.js'

/** What all steps work with; `connections` says how many streams there are. */
type PlainStepsMeans = Omit<PlainMeans, 'principal'> & { connections: () => number }

/** A request for a step. */
type Asking = Pick<AskedStep, 'run' | 'step' | 'takeover'> & {
  principal: Principal
  headers: IncomingHttpHeaders
  body: Readable
}

/** Steps that come as requests: of one run one after the other, each until its answer has been read. */
export class PlainSteps {
  readonly #means: PlainStepsMeans
  readonly #turns = new Turns()
  readonly #steps = new Set<PlainStep>()
  #onIdle: (() => void) | undefined

  constructor(means: PlainStepsMeans) {
    this.#means = means
  }

  /** Requests that wait for their turn, too. */
  get size(): number {
    return this.#steps.size
  }

  get inFlightBytes(): number {
    return [...this.#steps].reduce((sum, { inFlightBytes }) => sum + inFlightBytes, 0)
  }

  /** Resolves when every request has its answer. */
  async idle(): Promise<void> {
    if (this.#steps.size > 0)
      await new Promise<void>((resolve) => {
        this.#onIdle = resolve
      })
  }

  /**
   * Answers a request with the updates of its step. Throws what PlainStep does; REQUEST_INVALID for a body that is no
   * safetensors file or is cut off; OVERLOADED where there are too many connections.
   */
  async answer(asking: Asking, reply: FastifyReply): Promise<FastifyReply> {
    const { principal } = asking
    if (this.#means.runs.draining) throw new ServiceError('DRAINING', 'the service shuts down and begins no step')
    this.#checkConnections(principal)
    const step = new PlainStep({ ...this.#means, principal })
    const leave = principal.connect()
    this.#steps.add(step)
    const closed = new Promise<void>((resolve) => void reply.raw.once('close', resolve))
    const done = closed.then(() => {
      step.leave()
      leave()
      this.#steps.delete(step)
      if (this.#steps.size === 0) this.#onIdle?.()
    })
    return new Promise((resolve, reject) => {
      void this.#turns.take(asking.run, async () => {
        try {
          resolve(await this.#take(step, asking, reply))
        } catch (error) {
          step.leave()
          return reject(refusal(error))
        }
        await done
      })
    })
  }

  #checkConnections(principal: Principal): void {
    principal.checkConnections()
    const { connections, config } = this.#means
    const count = connections() + this.size
    if (count < config.max_connections) return
    const message = `there are ${count} streams and requests for steps, at most ${config.max_connections}`
    throw new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 })
  }

  async #take(step: PlainStep, asking: Asking, reply: FastifyReply): Promise<FastifyReply> {
    const { headers, body } = asking
    const { 'content-length': length, traceparent } = headers
    const { run, finished } = await step.take({
      ...asking,
      body: paced(body, this.#means.config),
      ...(length !== undefined && { bytes: Number(length) }),
      ...(typeof traceparent === 'string' && { traceparent }),
    })
    const { receipt } = finished
    const { bytes, pieces } = updateFile(run, finished)
    const file = Readable.from(this.#counted(pieces), { objectMode: false })
    file.once('close', () => step.leave())
    // Who takes the run over ends the answer, too, as it does a stream.
    step.failed.catch(() => file.destroy())
    reply.type('application/octet-stream').header('content-length', bytes)
    reply.header('muond-step', receipt.step).header('muond-digest', receipt.digest)
    return reply.header('muond-replayed', receipt.replayed).send(file)
  }

  *#counted(pieces: Iterable<Uint8Array>): Generator<Uint8Array> {
    for (const piece of pieces) {
      this.#means.metrics.sent_bytes_total.inc(piece.length)
      yield piece
    }
  }
}
