import type { CheckpointedFrame, OpenedFrame, OpenFrame, ReceiptFrame } from '../../wire/frame.js'
import { type Connection, whileIdle } from '../connection.js'
import { MuondError } from '../error.js'
import { type Backoff, backoffSeconds, sleep } from './backoff.js'
import { Exchange } from './exchange.js'
import type { Step } from './step.js'
import type { Updates } from './updates.js'

/** What a run needs from the client that opened it. */
export type Host = {
  dial: () => Promise<Connection>
  signal: AbortSignal
  /** Consecutive failed attempts at one step that brought no new update, before it is given up. */
  retries: number
  backoff: Backoff
  /** Most bytes of a gradient in one message; the service's own limit holds too. */
  chunk_bytes: number
}

export type Outcome = { receipt: ReceiptFrame } | { error: unknown }

/** The run's one writer as the service sees it: keeps the run open over as many connections as it takes. */
export class Writer {
  readonly #host: Host
  readonly #frame: OpenFrame
  #connection: Connection
  #opened: OpenedFrame
  #step: number
  #digest: string

  /** A first `open` is not retried: a wrong address, key or run should be heard of at once. @throws MuondError */
  static async open(host: Host, frame: OpenFrame): Promise<Writer> {
    return new Writer(host, frame, await handshake(host, frame))
  }

  private constructor(host: Host, frame: OpenFrame, { connection, opened }: Handshake) {
    this.#host = host
    this.#frame = frame
    this.#connection = connection
    this.#opened = opened
    this.#step = opened.step
    this.#digest = opened.digest
  }

  /** The service's answer to the newest `open`. */
  get opened(): OpenedFrame {
    return this.#opened
  }

  /** The last finished step. */
  get step(): number {
    return this.#step
  }

  /** Of the last finished step. */
  get digest(): string {
    return this.#digest
  }

  /** Asks for a checkpoint of the last finished step. Not retried: what is lost with its connection rejects. */
  async checkpoint(tag: string | undefined): Promise<CheckpointedFrame> {
    if (this.#connection.reason !== undefined) await this.#reopen(this.#step + 1)
    const answer = this.#connection.checkpointed()
    await Promise.race([answer, this.#connection.send({ type: 'checkpoint', ...(tag !== undefined && { tag }) })])
    return answer
  }

  /** Ends the connection. */
  release(reason: unknown): void {
    this.#connection.fail(reason)
  }

  /**
   * Takes a step, again and again over new connections as long as the trouble is worth a retry. Never rejects: a step whose
   * gradients are still to come has nobody yet who would listen.
   */
  async take(step: Step, updates: Updates): Promise<Outcome> {
    let failures = 0
    let waitSeconds = 0
    for (;;) {
      const before = updates.applied
      try {
        if (waitSeconds > 0) await sleep(waitSeconds, this.#host.signal)
        return { receipt: await this.#attempt(step, updates) }
      } catch (error) {
        this.#connection.fail(error)
        updates.forget()
        failures = updates.applied > before ? 1 : failures + 1
        if (!(error instanceof MuondError && error.retryable) || failures > this.#host.retries) return { error }
        waitSeconds = backoffSeconds(failures - 1, this.#host.backoff, error.fields.retry_after_seconds)
      }
    }
  }

  async #attempt(step: Step, updates: Updates): Promise<ReceiptFrame> {
    if (this.#connection.reason !== undefined) await this.#reopen(step.number)
    const connection = this.#connection
    const chunk_bytes = Math.min(this.#opened.limits.chunk_bytes, this.#host.chunk_bytes)
    const receipt = await Exchange.run({ connection, step, updates, chunk_bytes })
    this.#step = receipt.step
    this.#digest = receipt.digest
    return receipt
  }

  /** Groups stay out, the run remembers its schedule; a checkpoint too, or this would go back to it again. */
  async #reopen(step: number): Promise<void> {
    if (isTakenOver(this.#connection.reason)) throw this.#connection.reason
    const { groups, checkpoint, ...frame } = this.#frame
    const { connection, opened } = await handshake(this.#host, { ...frame, mode: 'resume', takeover: true })
    this.#connection = connection
    this.#requireSameHistory(opened, step)
    this.#opened = opened
  }

  /** The service may have finished the step whose receipt was lost; anything else is not where this client left the run. */
  #requireSameHistory({ run, step, digest }: OpenedFrame, number: number): void {
    if (step === number || (step === this.#step && digest === this.#digest)) return
    const message =
      step === this.#step
        ? `run '${run}' has digest ${digest} at step ${step}, this client has ${this.#digest}: open it again with weights of that history`
        : `run '${run}' resumed at step ${step}, this client is at step ${this.#step}: go back to your weights of step ${step} and open it again`
    throw new MuondError('STEP_CONFLICT', message, { step: number, expected_step: step + 1 })
  }
}

/** A run taken by another client is not taken back: the two would go on for ever. */
function isTakenOver(reason: unknown): boolean {
  return reason instanceof MuondError && reason.code === 'TAKEN_OVER'
}

type Handshake = { connection: Connection; opened: OpenedFrame }

async function handshake(host: Host, frame: OpenFrame): Promise<Handshake> {
  const connection = await host.dial()
  try {
    const opened = await new Promise<OpenedFrame>((resolve, reject) => {
      connection.onFrame = (answer) => {
        if (answer.type !== 'opened') return whileIdle(answer)
        connection.rest()
        resolve(answer)
      }
      connection.onClosed = reject
      connection.send(frame).catch(reject)
    })
    return { connection, opened }
  } catch (error) {
    connection.fail(error)
    throw error
  }
}
