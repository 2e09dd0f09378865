import assert from 'node:assert'
import type { Region } from '../device/region.js'
import { ServiceError } from '../errors.js'
import type { Run } from '../run/run.js'
import { Assembly } from '../wire/chunks.js'
import type { GradientHead } from '../wire/codec.js'
import type { GradientFrame } from '../wire/frame.js'
import { countRefused, type Gradient, type Means } from './answers.js'
import type { GradientSink } from './websocket/socket.js'

/** A gradient of which some chunks have come. */
type Incoming = Gradient & { assembly: Assembly; startedAt: number }

/** What the reception asks of its connection. */
export type ReceptionHooks = {
  /** Aborted when the connection ends. */
  gone: AbortSignal
  /** Throws where no gradient may begin at all. */
  checkOpen(gradient: { parameter: number; step: number }): void
  /** Throws where this step's may not. */
  checkStep(step: number): void
  /** Settles when the last update of a parameter was sent; undefined where there is none under way. */
  outstanding(parameter: number): Promise<void> | undefined
  /** The memory that `destination` has named is not to be written any more. */
  abandoned(): void
  /** Takes a gradient over that is complete. */
  complete(gradient: Gradient): void
}

/** The gradient that a connection is sending: its chunks go into a region of the arena that is reserved for all of it. */
export class Reception implements GradientSink {
  /** Whether the client is kept from sending because the arena has no room. */
  waits = false
  readonly #means: Means
  readonly #hooks: ReceptionHooks
  #incoming: Incoming | undefined
  /** The gradient whose first chunk was refused: the rest of it is dropped. */
  #dropped: { parameter: number; step: number } | undefined

  constructor(means: Means, hooks: ReceptionHooks) {
    this.#means = means
    this.#hooks = hooks
  }

  /** Whose gradient is incomplete, in words; undefined where none is. */
  get label(): string | undefined {
    return this.#incoming?.assembly.label
  }

  /** Bytes that the incomplete gradient has reserved. */
  get bytes(): number {
    return this.#incoming?.region.bytes ?? 0
  }

  /** When the incomplete gradient got its place, by performance.now(). */
  get startedAt(): number {
    return this.#incoming?.startedAt ?? 0
  }

  destination({ parameter, step, offset, dataLength }: GradientHead): Uint8Array | undefined {
    const incoming = this.#incoming
    if (incoming?.parameter !== parameter || incoming.step !== step) return undefined
    const { assembly, region } = incoming
    const fits = offset === assembly.received && offset + dataLength <= assembly.bytes
    if (!fits || dataLength > this.#means.config.chunk_bytes) return undefined
    return region.chunk(offset, dataLength)
  }

  received({ offset, dataLength }: GradientHead): void {
    assert(this.#incoming, 'whoever ends a reception abandons the destination')
    this.#incoming.assembly.accept({ offset, length: dataLength })
    this.#stored(this.#incoming, dataLength)
  }

  /** Takes a chunk that has come the ordinary way; a promise where nothing else may be looked at before it is stored. */
  take(run: Run, frame: GradientFrame): Promise<void> | undefined {
    const { parameter, step, offset } = frame
    if (this.#dropped?.parameter === parameter && this.#dropped.step === step && offset > 0) return undefined
    this.#dropped = undefined
    if (!this.#incoming) return this.#begin(run, frame)
    this.#continue(this.#incoming, frame)
    return undefined
  }

  /** Another frame has come: what follows belongs to no refused gradient any more. */
  forgetDropped(): void {
    this.#dropped = undefined
  }

  /** Gives up the incomplete gradient and its place. */
  abandon(): void {
    this.#hooks.abandoned()
    this.#incoming?.region.release()
    this.#incoming = undefined
  }

  #continue(incoming: Incoming, frame: GradientFrame): void {
    const { parameter, step, offset, data } = frame
    if (incoming.parameter !== parameter || incoming.step !== step) {
      throw new ServiceError(
        'FRAME_UNEXPECTED',
        `a chunk of parameter ${parameter}, step ${step} while ${incoming.assembly.label} is incomplete`,
      )
    }
    try {
      incoming.assembly.accept({ offset, length: data.length })
    } catch (error) {
      this.abandon()
      this.#dropped = { parameter, step }
      countRefused(this.#means.metrics, error)
      throw error
    }
    this.#store(incoming, frame)
  }

  /** Takes a gradient's first chunk: checks that it may be applied, and reserves its whole size. */
  #begin(run: Run, frame: GradientFrame): Promise<void> | undefined {
    const { parameter, step, offset, data } = frame
    if (offset === 0) this.#dropped = { parameter, step }
    const { name, gradient_bytes } = run.parameter(parameter)
    const assembly = new Assembly(gradient_bytes, `the gradient of parameter '${name}' for step ${step}`)
    if (offset > 0) assembly.accept({ offset, length: data.length })
    this.#hooks.checkOpen({ parameter, step })
    try {
      this.#hooks.checkStep(step)
      run.expect(parameter, step)
      assembly.accept({ offset, length: data.length })
    } catch (error) {
      countRefused(this.#means.metrics, error)
      throw error
    }
    this.#dropped = undefined
    const start = (region: Region) => {
      this.#incoming = { run, parameter, step, assembly, region, startedAt: performance.now() }
      this.#store(this.#incoming, frame)
    }
    const outstanding = this.#hooks.outstanding(parameter)
    const region = outstanding ? undefined : this.#means.device.staging.tryReserve(gradient_bytes)
    if (region) return void start(region)
    return this.#startWhenFree(outstanding, gradient_bytes, start)
  }

  // One update per parameter is kept, so the same parameter again waits until that was sent.
  async #startWhenFree(
    outstanding: Promise<void> | undefined,
    bytes: number,
    start: (region: Region) => void,
  ): Promise<void> {
    await outstanding
    const { staging } = this.#means.device
    this.waits = true
    const region = await staging.reserve(bytes, this.#hooks.gone)
    this.waits = false
    if (region === undefined) return
    if (this.#hooks.gone.aborted) region.release()
    else start(region)
  }

  #store(incoming: Incoming, { offset, data }: GradientFrame): void {
    incoming.region.chunk(offset, data.length).set(data)
    this.#stored(incoming, data.length)
  }

  #stored({ assembly, startedAt, ...gradient }: Incoming, bytes: number): void {
    this.#means.metrics.received_bytes_total.inc(bytes)
    if (!assembly.complete) return
    this.#incoming = undefined
    gradient.run.spend('receive', (performance.now() - startedAt) / 1000)
    this.#hooks.complete(gradient)
  }
}
