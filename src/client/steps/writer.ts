import type { CheckpointedFrame, MemberStatus, OpenedFrame, OpenFrame, ReceiptFrame } from '../../wire/frame.js'
import { type Connection, memberKey } from '../connection.js'
import { MuondError } from '../error.js'
import type { Handshake, Transport, TransportKind } from '../transport/transport.js'
import type { Backoff } from './backoff.js'
import { Exchange } from './exchange.js'
import type { Dial, Route } from './handshake.js'
import { outlast } from './outlast.js'
import type { Step } from './step.js'
import type { Updates } from './updates.js'

/** What a run needs from the client that opened it. */
export type Host = Dial & {
  /** Ends with the client. */
  signal: AbortSignal
  /** Consecutive failed attempts at one step that brought no new update, before it is given up. */
  retries: number
  backoff: Backoff
  /** Most bytes of a gradient in one message; the service's own limit holds too. */
  chunk_bytes: number
  transport: TransportKind
}

export type Outcome = { receipt: ReceiptFrame } | { error: unknown }

/** What writes a run: over one connection, or over one for each of its shards. */
export type RunWriter = Pick<
  Writer,
  'opened' | 'members' | 'step' | 'digest' | 'checkpoint' | 'release' | 'reopen' | 'take' | 'transport' | 'slot'
>

/** The run's one writer as the service sees it: keeps the run open over as many connections as it takes. */
export class Writer {
  readonly #host: Host
  readonly #frame: OpenFrame
  readonly #transport: Transport
  readonly #route: Route
  #connection: Connection
  #opened: OpenedFrame
  #step: number
  #digest: string
  /** Ends every connection and every wait since the run was opened, or opened again by `reopen`. */
  #stop = new AbortController()

  /** `shaken` is the first connection and the answer to its `open`; `route` leads to the run again. */
  constructor(
    host: Host,
    { frame, transport, route }: { frame: OpenFrame; transport: Transport; route: Route },
    { connection, opened }: Handshake,
  ) {
    this.#host = host
    this.#frame = frame
    this.#transport = transport
    this.#route = route
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

  /** How gradients and updates travel at present. */
  get transport(): 'shm' | 'websocket' {
    return this.#transport.taken ? 'shm' : 'websocket'
  }

  /** The memory that the service reads a parameter's gradient from; undefined where it goes over the socket. */
  slot(parameter: number): Uint8Array<ArrayBuffer> | undefined {
    return this.#transport.taken?.gradient(parameter)
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
    const frame = { ...resuming(this.#frame), ...(checkpoint !== undefined && { checkpoint }) }
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

  /** As `outlast`, over one connection after the other. */
  #outlast<T>(attempt: () => Promise<T>, updates?: Updates): Promise<T> {
    const { retries, backoff } = this.#host
    return outlast(attempt, {
      ...{ retries, backoff, signal: AbortSignal.any([this.#host.signal, this.#stop.signal]) },
      applied: () => updates?.applied ?? 0,
      failed: (error) => {
        this.#connection.fail(error)
        updates?.forget()
      },
    })
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
    const { connection, opened } = await this.#handshake(resuming(this.#frame))
    const elsewhere = parted(opened, { step: this.#step, digest: this.#digest }, step)
    if (elsewhere !== undefined) {
      connection.fail(elsewhere)
      throw elsewhere
    }
    this.#connection = connection
    this.#opened = opened
  }

  #handshake(frame: OpenFrame): Promise<Handshake> {
    return this.#transport.agree((offers) => this.#shake({ ...frame, ...offers }))
  }

  /**
   * @throws MuondError RUN_NOT_FOUND with the step that the run was at, which tells a service that forgot it from a
   * wrong name
   */
  async #shake(frame: OpenFrame): Promise<Handshake> {
    try {
      const shaken = await this.#route.open(frame, this.#stop.signal)
      if (shaken.opened) return shaken
      const message = `run '${frame.run}' has ${shaken.placed.shards.length} shards now, it was opened as one of one process`
      shaken.connection.fail(new MuondError('RUN_MISMATCH', message))
      throw new MuondError('RUN_MISMATCH', message)
    } catch (error) {
      if (!(error instanceof MuondError) || error.code !== 'RUN_NOT_FOUND') throw error
      const { code, fields, status } = error
      const where = `it was at step ${this.#step} here: was the service restarted without durable state?`
      throw new MuondError(code, `${error.message}; ${where}`, fields, { cause: error, status, retryable: false })
    }
  }
}

/**
 * The frame that opens a run again. Groups stay out, the run remembers its schedule; a checkpoint too, or this would go
 * back to it again, and where the run has come from.
 */
export function resuming({ groups, checkpoint, from, weights, ...frame }: OpenFrame): OpenFrame {
  return { ...frame, mode: 'resume', takeover: true }
}

type Standing = { readonly step: number; readonly digest: string }

/**
 * Why a client that was at `left` cannot take step `number` of a run that was opened again; undefined where it can. The
 * service may have finished the step whose receipt was lost; anything else is not where this client left the run.
 */
export function parted(
  { run, step, digest }: Standing & { readonly run: string },
  left: Standing,
  number: number,
): MuondError | undefined {
  if (step === number || (step === left.step && digest === left.digest)) return undefined
  const message =
    step === left.step
      ? `run '${run}' has digest ${digest} at step ${step}, this client has ${left.digest}: open it again with weights of that history`
      : `run '${run}' resumed at step ${step}, this client is at step ${left.step}: go back to your weights of step ${step} and open it again`
  return new MuondError('STEP_CONFLICT', message, { step: number, expected_step: step + 1 })
}

/**
 * Whether only `reopen` opens the run again. A run taken by another client is not taken back unasked: the two would go
 * on for ever. After a `reopen` that failed the trainer's weights may be those of another step.
 */
export function isFinal(reason: unknown): boolean {
  return reason instanceof MuondError && (reason.code === 'TAKEN_OVER' || reason.code === 'CLIENT_CLOSED')
}
