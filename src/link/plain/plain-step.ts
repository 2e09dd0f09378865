import assert from 'node:assert'
import { setTimeout as delay } from 'node:timers/promises'
import type { Principal } from '../../access/principal.js'
import type { Rate } from '../../access/rate.js'
import { ServiceError } from '../../errors.js'
import type { Runs } from '../../keep/runs.js'
import { type Receipt, refusalOf } from '../../run/history.js'
import type { Connection } from '../../run/members/member.js'
import type { Update } from '../../run/place.js'
import type { Run } from '../../run/run.js'
import { readStreamHeader, TensorCutter, type TensorPart } from '../../store/safetensors-stream.js'
import { PROTOCOL } from '../../wire/frame.js'
import { countRefused, type Gradient, type Joined, type Means, updateOf } from '../answers.js'
import { Reception } from '../reception.js'
import { type GivenStep, headerLimit, readGivenStep } from './gradient-file.js'

export type PlainMeans = Means & {
  runs: Runs
  principal: Principal
  /** Of the bytes that all streams send. */
  rate: Rate
}

/** A step that is asked for; `bytes` is the length of the body, where its sender has said it. */
export type AskedStep = {
  run: string
  step: number
  takeover: boolean
  traceparent?: string | undefined
  bytes?: number | undefined
  body: AsyncIterable<Uint8Array>
}

/** What a step came to; `skipped` are row scales of parameters without a gradient: QK-clip scales them all the same. */
export type FinishedStep = {
  receipt: Receipt
  updates: readonly { index: number; update: Update }[]
  skipped: readonly { index: number; row_scale: Uint8Array }[]
}

/**
 * One step of a run as one request: a connection that opens the run, sends the gradients of a file, ends the step and
 * keeps the updates until `leave`. What is checked, computed and kept is what the frames of a stream would have.
 */
export class PlainStep implements Connection {
  readonly #means: PlainMeans
  readonly #reception: Reception
  readonly #gone = new AbortController()
  /** Rejects when the step cannot go on, with the first reason. */
  readonly #failure: Promise<never>
  #fail!: (error: unknown) => void
  #joined: Joined | undefined
  readonly #computing = new Map<number, Promise<void>>()
  readonly #updates: { index: number; update: Update }[] = []

  constructor(means: PlainMeans) {
    this.#means = means
    this.#failure = new Promise<never>((_, reject) => {
      this.#fail = reject
    })
    // Whoever waits hears of it; after the end nobody does.
    this.#failure.catch(() => {})
    this.#reception = new Reception(means, {
      answers: {
        begin: (gradient) => void this.#computing.set(gradient.parameter, this.#compute(gradient)),
        outstanding: (parameter) => this.#computing.get(parameter),
        /* c8 ignore next -- only gradients in shared memory ask for it */
        fewerThan: () => Promise.resolve(),
      },
      gone: this.#gone.signal,
      /* c8 ignore next -- as above */
      refused: (error) => this.#fail(error),
      /* c8 ignore next -- as above */
      shared: () => {},
      // An `open` that was granted may end its step.
      checkOpen: () => {},
      // No chunk is received in place: each is copied to wherever the gradient is.
      abandoned: () => {},
      /* c8 ignore next -- a gradient moves when another run lacks room */
      redirected: () => {},
    })
  }

  /** Gradient bytes that have not come whole, and update bytes that were not sent. */
  get inFlightBytes(): number {
    return this.#updates.reduce((sum, { update }) => sum + update.memory.bytes, this.#reception.bytes)
  }

  fence(): void {
    this.#means.metrics.takeovers_total.inc()
    this.#fail(new ServiceError('RUN_BUSY', 'another connection has taken the run over'))
  }

  expel(error: ServiceError): void {
    this.#fail(error)
  }

  /* c8 ignore next 3 -- a run's only member hears of no others */
  changed(): void {
    // There are none.
  }

  /**
   * Takes the step. The caller calls `leave` when the answer has been sent, and where this throws: whatever a stream is
   * told as an error, and SafetensorsError for a body that is no safetensors file.
   */
  async take(asked: AskedStep): Promise<{ run: Run; finished: FinishedStep }> {
    const joined = await this.#open(asked)
    try {
      return { run: joined.run, finished: await this.#step(joined, asked) }
    } catch (error) {
      if (error instanceof ServiceError) joined.run.refused(refusalOf(error, joined.member))
      throw error
    }
  }

  /** Rejects where another connection takes the run over, or the run is gone. */
  get failed(): Promise<never> {
    return this.#failure
  }

  /** Lets go of the run, and of the memory of updates. What is computed later is let go of at once. */
  leave(): void {
    if (this.#gone.signal.aborted) return
    this.#reception.abandon()
    this.#gone.abort()
    this.#joined?.run.intake.detach(this.#joined.member)
    for (const { update } of this.#updates.splice(0)) update.memory.release()
  }

  async #open({ run: name, takeover }: AskedStep): Promise<Joined> {
    const { runs, principal } = this.#means
    const frame = { type: 'open', protocol: PROTOCOL, run: name, mode: 'resume', takeover } as const
    const { run, member } = await runs.open(frame, this, principal)
    this.#joined = { run, member }
    if (!this.#gone.signal.aborted) return this.#joined
    /* c8 ignore next 3 -- the client may go while the run is brought to memory */
    run.intake.detach(member)
    throw new ServiceError('REQUEST_INVALID', 'the connection was lost before the run was there')
  }

  async #step(joined: Joined, asked: AskedStep): Promise<FinishedStep> {
    const { run, member } = joined
    const { step } = asked
    const given = await this.#receive(joined, asked)
    const { skipped } = given
    const end = { step, skipped, weight: 1 }
    run.intake.beginEnd(member, end)
    await this.#orFail(Promise.all(this.#computing.values()))
    const receipt = await this.#orFail(run.intake.end(member, end))
    /* c8 ignore next -- the member may be lost while the step is ended */
    if (typeof receipt !== 'object') return this.#failure
    this.#updates.sort((one, other) => one.index - other.index)
    const scales = [...run.skippedRowScales(member)].map(({ parameter, row_scale }) => ({
      index: parameter,
      row_scale,
    }))
    return { receipt, updates: this.#updates, skipped: scales }
  }

  /** Has every gradient of the body begin; answers what its header says. */
  async #receive(joined: Joined, asked: AskedStep): Promise<GivenStep> {
    const pieces = this.#counted(asked.body)
    try {
      const { header, start, rest } = await this.#orFail(readStreamHeader(pieces, limitsOf(joined, asked)))
      // What an earlier request has had applied is held against this one before anything else of it is applied: of two
      // requests with other gradients in the same order none is applied in part.
      const ahead = new Set(joined.run.ahead)
      const given = { ...readGivenStep(joined.run, { ...asked, header }, this.#means.config), ahead }
      if (given.frame) joined.run.intake.announce(joined.member, given.frame)
      const cutter = new TensorCutter(header, start)
      const take = (piece: Uint8Array) => this.#take(joined, { step: asked.step, parts: cutter.cut(piece), given })
      await take(rest)
      for (;;) {
        const next = await this.#orFail(pieces.next())
        if (next.done) break
        await take(next.value)
      }
      cutter.end()
      return given
    } finally {
      // Where a piece is still waited for, its coming ends this, and nobody waits for that.
      pieces.return(undefined).catch(() => {})
    }
  }

  async #take(
    joined: Joined,
    { step, parts, given }: { step: number; parts: Iterable<TensorPart>; given: GivenStep & { ahead: Set<number> } },
  ): Promise<void> {
    for (const { range, offset, bytes } of parts) {
      const parameter = given.parameters.get(range.name)
      assert(parameter, 'every name of the header was found in the run')
      const frame = { type: 'gradient', parameter: parameter.index, step, offset, data: bytes } as const
      const waits = this.#reception.take(joined, frame)
      /* c8 ignore next -- whether the arena has room at once depends on how fast the lanes are */
      if (waits) await this.#orFail(waits)
      if (given.ahead.has(parameter.index)) await this.#orFail(this.#computing.get(parameter.index))
    }
  }

  /** Counts what comes against the bytes a second of its key, and of all: what is too much is waited for. */
  async *#counted(body: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
    const rates = [this.#means.principal.rate, this.#means.rate]
    for await (const piece of body) {
      for (const rate of rates) rate.spend(piece.length)
      yield piece
      const milliseconds = Math.max(...rates.map((rate) => rate.wait()))
      if (milliseconds > 0) await delay(milliseconds)
    }
  }

  async #compute(gradient: Gradient): Promise<void> {
    const { metrics } = this.#means
    try {
      const update = await updateOf(gradient, metrics)
      if (!update) return
      if (this.#gone.signal.aborted) return update.memory.release()
      this.#updates.push({ index: gradient.parameter, update })
    } catch (error) {
      countRefused(metrics, error)
      this.#fail(error)
    }
  }

  /** What a promise gives, or the failure of the step where that comes first. */
  #orFail<T>(promise: T | Promise<T>): Promise<T> {
    return Promise.race([this.#failure, promise])
  }
}

/** What the header of a body may be. */
function limitsOf({ run }: Joined, { bytes }: AskedStep): { headerBytes: number; bytes?: number } {
  return { headerBytes: headerLimit(run), ...(bytes !== undefined && { bytes }) }
}
