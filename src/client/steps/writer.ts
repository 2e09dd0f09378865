import type { CheckpointedFrame, MemberStatus, OpenedFrame, OpenFrame, ReceiptFrame } from '../../wire/frame.js'
import { type Connection, memberKey, whileIdle } from '../connection.js'
import { MuondError } from '../error.js'
import type { Handshake, Transport, TransportKind } from '../transport/transport.js'
import { type Backoff, backoffSeconds, sleep } from './backoff.js'
import { Exchange } from './exchange.js'
import type { Step } from './step.js'
import type { Updates } from './updates.js'

/** What a run needs from the client that opened it. */
export type Host = {
  /** A new connection, which ends with this signal or with the client. */
  dial: (signal: AbortSignal) => Promise<Connection>
  /** Ends with the client. */
  signal: AbortSignal
  /** Consecutive failed attempts at one step that brought no new update, before it is given up. */
  retries: number
  backoff: Backoff
  /** Most bytes of a gradient in one message; the service's own limit holds too. */
  chunk_bytes: number
  transport: TransportKind
  /** Whether the address leads to this host. */
  isLocal: boolean
}

export type Outcome = { receipt: ReceiptFrame } | { error: unknown }

/** The run's one writer as the service sees it: keeps the run open over as many connections as it takes. */
export class Writer {
  readonly #host: Host
  readonly #frame: OpenFrame
  readonly #transport: Transport
  #connection: Connection
  #opened: OpenedFrame
  #step: number
  #digest: string
  /** Ends every connection and every wait since the run was opened, or opened again by `reopen`. */
  #stop = new AbortController()

  /** A first `open` is not retried: a wrong address, key or run should be heard of at once. @throws MuondError */
  static async open(host: Host, frame: OpenFrame, transport: Transport): Promise<Writer> {
    const shake = async (offers: Partial<OpenFrame>) => handshake(await host.dial(host.signal), { ...frame, ...offers })
    return new Writer(host, { frame, transport }, await transport.agree(shake))
  }

  private constructor(
    host: Host,
    { frame, transport }: { frame: OpenFrame; transport: Transport },
    { connection, opened }: Handshake,
  ) {
    this.#host = host
    this.#frame = frame
    this.#transport = transport
    this.#connection = connection
    this.#opened = opened
    this.#step = opened.step
    this.#digest = opened.digest
  }

  /** The service's answer to the newest `open`. */
  get opened(): OpenedFrame {
    return this.#opened
  }

  /** The run's members as the newest frames tell of them. */
  get members(): readonly MemberStatus[] {
    const now = this.#connection.members
    return (this.#opened.members ?? []).map((status) => now.get(memberKey(status)) ?? status)
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
    if (this.#connection.reason !== undefined) await this.#resume(this.#step + 1)
    const answer = this.#connection.checkpointed()
    await Promise.race([answer, this.#connection.send({ type: 'checkpoint', ...(tag !== undefined && { tag }) })])
    return answer
  }

  /** Ends the connection, and a step in flight with it: that is not tried again. */
  release(reason: unknown): void {
    this.#stop.abort(reason)
    this.#connection.fail(reason)
  }

  /**
   * Opens the run again wherever the service has it now, or at a checkpoint. Not while a step is in flight: `release`
   * ends one. Tried again as a step is.
   */
  async reopen(checkpoint: string | undefined): Promise<void> {
    this.#stop = new AbortController()
    const frame = { ...this.#resuming(), ...(checkpoint !== undefined && { checkpoint }) }
    const { connection, opened } = await this.#outlast(() => this.#handshake(frame))
    this.#connection = connection
    this.#opened = opened
    this.#step = opened.step
    this.#digest = opened.digest
  }

  /**
   * Takes a step, again and again over new connections as long as the trouble is worth a retry. Never rejects: a step
   * whose gradients are still to come has nobody yet who would listen.
   */
  async take(step: Step, updates: Updates): Promise<Outcome> {
    try {
      return { receipt: await this.#outlast(() => this.#attempt(step, updates), updates) }
    } catch (error) {
      return { error }
    }
  }

  /**
   * Does `attempt` until it succeeds; rejects with what is not worth a retry. An attempt that brought updates counts as
   * the first.
   */
  async #outlast<T>(attempt: () => Promise<T>, updates?: Updates): Promise<T> {
    const signal = AbortSignal.any([this.#host.signal, this.#stop.signal])
    let failures = 0
    for (;;) {
      const before = updates?.applied ?? 0
      let wait: number
      try {
        return await attempt()
      } catch (error) {
        this.#connection.fail(error)
        updates?.forget()
        failures = updates !== undefined && updates.applied > before ? 1 : failures + 1
        if (!isWorthAnother(error) || failures > this.#host.retries) throw error
        wait = backoffSeconds(failures - 1, this.#host.backoff, error.fields.retry_after_seconds)
      }
      await sleep(wait, signal)
    }
  }

  async #attempt(step: Step, updates: Updates): Promise<ReceiptFrame> {
    if (this.#connection.reason !== undefined) await this.#resume(step.number)
    const connection = this.#connection
    const chunk_bytes = Math.min(this.#opened.limits.chunk_bytes, this.#host.chunk_bytes)
    const { taken: arenas } = this.#transport
    const averages = (this.#opened.member?.replicas ?? 1) > 1
    const { retries } = this.#host
    const receipt = await Exchange.run({ connection, step, updates, chunk_bytes, arenas, averages, retries })
    this.#step = receipt.step
    this.#digest = receipt.digest
    return receipt
  }

  /** Opens the run again after its connection was lost, and only where this client left it. */
  async #resume(step: number): Promise<void> {
    if (isFinal(this.#connection.reason)) throw this.#connection.reason
    const { connection, opened } = await this.#handshake(this.#resuming())
    const parted = this.#parted(opened, step)
    if (parted !== undefined) {
      connection.fail(parted)
      throw parted
    }
    this.#connection = connection
    this.#opened = opened
  }

  /**
   * Groups stay out, the run remembers its schedule; a checkpoint too, or this would go back to it again, and where the
   * run has come from.
   */
  #resuming(): OpenFrame {
    const { groups, checkpoint, from, weights, ...frame } = this.#frame
    return { ...frame, mode: 'resume', takeover: true }
  }

  #handshake(frame: OpenFrame): Promise<Handshake> {
    return this.#transport.agree((offers) => this.#shake({ ...frame, ...offers }))
  }

  /**
   * @throws MuondError RUN_NOT_FOUND with the step that the run was at, which tells a service that forgot it from a
   * wrong name
   */
  async #shake(frame: OpenFrame): Promise<Handshake> {
    const connection = await this.#host.dial(this.#stop.signal)
    try {
      return await handshake(connection, frame)
    } catch (error) {
      if (!(error instanceof MuondError) || error.code !== 'RUN_NOT_FOUND') throw error
      const { code, fields, status } = error
      const where = `it was at step ${this.#step} here: was the service restarted without durable state?`
      throw new MuondError(code, `${error.message}; ${where}`, fields, { cause: error, status, retryable: false })
    }
  }

  /**
   * The service may have finished the step whose receipt was lost; anything else is not where this client left the run.
   */
  #parted({ run, step, digest }: OpenedFrame, number: number): MuondError | undefined {
    if (step === number || (step === this.#step && digest === this.#digest)) return undefined
    const message =
      step === this.#step
        ? `run '${run}' has digest ${digest} at step ${step}, this client has ${this.#digest}: open it again with weights of that history`
        : `run '${run}' resumed at step ${step}, this client is at step ${this.#step}: go back to your weights of step ${step} and open it again`
    return new MuondError('STEP_CONFLICT', message, { step: number, expected_step: step + 1 })
  }
}

/**
 * Whether only `reopen` opens the run again. A run taken by another client is not taken back unasked: the two would go
 * on for ever. After a `reopen` that failed the trainer's weights may be those of another step.
 */
function isFinal(reason: unknown): boolean {
  return reason instanceof MuondError && (reason.code === 'TAKEN_OVER' || reason.code === 'CLIENT_CLOSED')
}

/** A quorum was waited for as often as allowed over one connection already: another one brings no replica. */
function isWorthAnother(error: unknown): error is MuondError {
  return error instanceof MuondError && error.retryable && error.code !== 'QUORUM_LOST'
}

async function handshake(connection: Connection, frame: OpenFrame): Promise<Handshake> {
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
