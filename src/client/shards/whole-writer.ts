import type {
  CheckpointedFrame,
  MemberStatus,
  OpenedFrame,
  OpenFrame,
  PlacedFrame,
  ReceiptFrame,
} from '../../wire/frame.js'
import { type Connection, memberKey } from '../connection.js'
import { MuondError } from '../error.js'
import { frameError } from '../refusal.js'
import { Exchange } from '../steps/exchange.js'
import type { Route } from '../steps/handshake.js'
import { outlast } from '../steps/outlast.js'
import type { Bound } from '../steps/parameter.js'
import type { Step } from '../steps/step.js'
import { type Host, isFinal, type Outcome, parted, type RunWriter, resuming } from '../steps/writer.js'
import type { Placing } from '../transport/transport.js'
import { mergedRefusal, ofWhole } from './errors.js'
import { openedOf } from './opened.js'
import { Part } from './part.js'
import { shareOut } from './sharing.js'

type Control = { connection: Connection; placed: PlacedFrame }

/**
 * The writer of a run that is spread over several processes: a connection to each shard, and one to the head, which
 * says when a step is done. All of them are opened together, and where one is lost all are.
 */
export class WholeWriter implements RunWriter {
  readonly #host: Host
  readonly #frame: OpenFrame
  readonly #route: Route
  readonly #parts: readonly Part[]
  #control: Control
  #step: number
  #digest: string
  /** The step whose updates the parts take. */
  #taking: number
  #stop = new AbortController()
  /** A checkpoint that is being taken: no step begins before it is. */
  #checkpointing: Promise<unknown> = Promise.resolve()

  /** As the first `open` of any run, this is not retried. @throws MuondError */
  static async open(
    host: Host,
    { frame, route, parameters }: { frame: OpenFrame; route: Route; parameters: readonly Bound[] },
    { connection, placed }: Placing,
  ): Promise<WholeWriter> {
    try {
      const parts = placed.shards.map((shard, index) => new Part(host, { shard, index, parameters }))
      const writer = new WholeWriter(host, { frame, route, parts, control: { connection, placed } })
      await writer.#openParts(placed, frame)
      return writer
    } catch (error) {
      connection.fail(error)
      throw error
    }
  }

  private constructor(
    host: Host,
    { frame, route, parts, control }: { frame: OpenFrame; route: Route; parts: readonly Part[]; control: Control },
  ) {
    this.#host = host
    this.#frame = frame
    this.#route = route
    this.#parts = parts
    this.#control = control
    this.#step = control.placed.step
    this.#digest = control.placed.digest
    this.#taking = this.#step + 1
    for (const { updates } of parts) updates.next(this.#taking)
    host.signal.addEventListener('abort', () => this.#close(), { once: true })
  }

  get opened(): OpenedFrame {
    return openedOf(this.#control.placed, this.#parts)
  }

  get members(): readonly MemberStatus[] {
    const [{ connection, opened }] = this.#parts
    return (opened.members ?? []).map((status) => connection.members.get(memberKey(status)) ?? status)
  }

  get step(): number {
    return this.#step
  }

  get digest(): string {
    return this.#digest
  }

  get transport(): 'shm' | 'websocket' {
    return this.#parts.every(({ transport }) => transport.taken) ? 'shm' : 'websocket'
  }

  slot(parameter: number): Uint8Array<ArrayBuffer> | undefined {
    for (const part of this.#parts) {
      const local = part.local(parameter)
      if (local !== undefined) return part.transport.taken?.gradient(local)
    }
    /* c8 ignore next 2 -- every parameter of a whole is in a shard */
    return undefined
  }

  async checkpoint(tag: string | undefined): Promise<CheckpointedFrame> {
    if (!this.#isConnected) await this.#resume(this.#step + 1)
    const { connection } = this.#control
    const answer = connection.checkpointed()
    this.#checkpointing = answer.catch(() => undefined)
    await Promise.race([answer, connection.send({ type: 'checkpoint', ...(tag !== undefined && { tag }) })])
    return answer
  }

  release(reason: unknown): void {
    this.#stop.abort(reason)
    this.#fail(reason)
  }

  async reopen(checkpoint: string | undefined): Promise<void> {
    this.#stop = new AbortController()
    const frame = { ...resuming(this.#frame), ...(checkpoint !== undefined && { checkpoint }) }
    const { placed } = await this.#outlast(() => this.#open(frame))
    this.#step = placed.step
    this.#digest = placed.digest
    this.#take(placed.step + 1)
  }

  async take(step: Step): Promise<Outcome> {
    await this.#checkpointing
    if (step.number !== this.#taking) this.#take(step.number)
    const known = new Set(this.#parts.flatMap((part) => [...part.attentions]))
    const steps = this.#parts.map((part) => part.stepOf(step, known))
    void shareOut(step, this.#parts, steps)
    try {
      const receipt = await this.#outlast(() => this.#attempt(step, steps))
      for (const [i, part] of this.#parts.entries())
        for (const [local, frame] of steps[i].leftOut) {
          const parameter = part.indices[local]
          step.leftOut.set(parameter, { ...frame, parameter })
        }
      return { receipt }
    } catch (error) {
      return { error }
    }
  }

  /** The parts take updates of this step from now on. */
  #take(step: number): void {
    this.#taking = step
    for (const { updates } of this.#parts) updates.next(step)
  }

  get #isConnected(): boolean {
    return this.#control.connection.reason === undefined && this.#parts.every((part) => part.isConnected)
  }

  #outlast<T>(attempt: () => Promise<T>): Promise<T> {
    const { retries, backoff } = this.#host
    return outlast(attempt, {
      ...{ retries, backoff, signal: AbortSignal.any([this.#host.signal, this.#stop.signal]) },
      applied: () => this.#parts.reduce((sum, { updates }) => sum + updates.applied, 0),
      failed: (error) => {
        this.#fail(error)
        for (const { updates } of this.#parts) updates.forget()
      },
    })
  }

  async #attempt(step: Step, steps: readonly Step[]): Promise<ReceiptFrame> {
    if (!this.#isConnected) await this.#resume(step.number)
    await this.#exchange(steps)
    const receipt = await this.#end(step.number)
    this.#step = receipt.step
    this.#digest = receipt.digest
    return receipt
  }

  /**
   * Takes a step of every shard. Where a shard has refused gradients the others are waited for, so that nothing is
   * applied afterwards; where a connection is lost, all are given up.
   */
  async #exchange(steps: readonly Step[]): Promise<void> {
    const { retries } = this.#host
    const outcomes = await Promise.allSettled(
      this.#parts.map(async (part, i) => {
        const { connection, updates, transport, opened } = part
        const chunk_bytes = Math.min(opened.limits.chunk_bytes, this.#host.chunk_bytes)
        const parts = {
          connection,
          step: steps[i],
          updates,
          chunk_bytes,
          arenas: transport.taken,
          averages: false,
          retries,
        }
        return Exchange.run(parts).catch((error) => {
          const known = ofWhole(error, part)
          if (!isRefusal(known)) this.#fail(known)
          throw known
        })
      }),
    )
    const errors = outcomes.flatMap((outcome) => (outcome.status === 'rejected' ? [outcome.reason] : []))
    if (errors.length > 0) throw mergedRefusal(errors)
  }

  /** Waits until the head has committed the step. */
  #end(step: number): Promise<ReceiptFrame> {
    const { connection } = this.#control
    return new Promise((resolve, reject) => {
      connection.onFrame = (frame) => {
        if (frame.type === 'draining') return
        connection.rest()
        if (frame.type === 'receipt' && frame.step === step) return resolve(frame)
        if (frame.type === 'error') return reject(frameError(frame))
        reject(new MuondError('FRAME_UNEXPECTED', `the head sent ${frame.type}, expected the receipt of step ${step}`))
      }
      connection.onClosed = reject
      connection.send({ type: 'end', step }).catch(reject)
    })
  }

  /** Opens everything again after a connection was lost, and only where this client left the run. */
  async #resume(step: number): Promise<void> {
    const reasons = [this.#control.connection.reason, ...this.#parts.map(({ connection }) => connection.reason)]
    const final = reasons.find(isFinal)
    if (final !== undefined) throw final
    const left = { step: this.#step, digest: this.#digest }
    await this.#open(resuming(this.#frame), (placed) => parted(placed, left, step))
  }

  async #open(
    frame: OpenFrame,
    refuse: (placed: PlacedFrame) => MuondError | undefined = () => undefined,
  ): Promise<Control> {
    this.#fail(new MuondError('CONNECTION_LOST', 'another connection of the run was lost: all are opened again'))
    const shaken = await this.#route.open(frame, this.#stop.signal)
    const { connection, placed } = shaken.opened ? { ...shaken, placed: undefined } : shaken
    const mismatch = `run '${frame.run}' does not have ${this.#parts.length} shards any more`
    if (placed?.shards.length !== this.#parts.length)
      throw refused(connection, new MuondError('RUN_MISMATCH', mismatch))
    const refusal = refuse(placed)
    if (refusal) throw refused(connection, refusal)
    this.#control = { connection, placed }
    await this.#openParts(placed, frame)
    return this.#control
  }

  async #openParts(placed: PlacedFrame, frame: OpenFrame): Promise<void> {
    const { signal } = this.#stop
    const opened = await Promise.allSettled(this.#parts.map((part) => part.open(this.#host, { placed, frame, signal })))
    const failed = opened.find((outcome) => outcome.status === 'rejected')
    if (!failed) return
    this.#fail(failed.reason)
    throw failed.reason
  }

  #fail(reason: unknown): void {
    this.#control.connection.fail(reason)
    for (const part of this.#parts) part.fail(reason)
  }

  #close(): void {
    for (const { transport } of this.#parts) transport.close()
  }
}

/** Ends a connection whose answer cannot be gone on with. */
function refused(connection: Connection, error: MuondError): MuondError {
  connection.fail(error)
  return error
}

/** Whether an error is about gradients that a shard has refused, while its connection goes on. */
function isRefusal(error: unknown): boolean {
  return error instanceof MuondError && error.fields.refused !== undefined
}
