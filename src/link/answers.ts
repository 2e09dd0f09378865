import type { Config } from '../config.js'
import type { Device } from '../device/device.js'
import type { Region } from '../device/region.js'
import { ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import type { Run } from '../run/run.js'
import type { ScaledUpdate } from '../run/shard.js'
import type { Member } from '../run/step/member.js'
import type { Step } from '../run/step/step.js'
import { chunksOf } from '../wire/chunks.js'
import { encodeHeader } from '../wire/codec.js'
import type { Sender } from './websocket/sender.js'

/** What a connection works with. */
export type Means = { config: Config; device: Device; metrics: Metrics }

/** A run that a connection has opened, and the connection as a member of it. */
export type Joined = { run: Run; member: Member }

/**
 * A gradient that lies whole in its region, once `ready` has settled if it is there. The run that computes it takes the
 * region over.
 */
export type Gradient = Joined & { step: Step; parameter: number; region: Region; ready?: Promise<void> }

/** Has one connection's gradients computed and sends their updates, at most one of a parameter at a time. */
export class Answers {
  /** Bytes of gradients that are being computed and of updates that were not sent yet. */
  bytes = 0
  readonly #means: Means
  readonly #sender: Sender
  readonly #report: (error: unknown) => void
  #outstanding = new Map<number, Promise<void>>()

  /** `report` tells the client of a refusal. */
  constructor(means: Means, sender: Sender, report: (error: unknown) => void) {
    this.#means = means
    this.#sender = sender
    this.#report = report
  }

  get busy(): boolean {
    return this.#outstanding.size > 0
  }

  /** Settles when the update of a parameter has left its memory; undefined where there is none. */
  outstanding(parameter: number): Promise<void> | undefined {
    return this.#outstanding.get(parameter)
  }

  async settled(): Promise<void> {
    await Promise.all(this.#outstanding.values())
  }

  /** Takes the gradient over. */
  begin(gradient: Gradient): void {
    const { run, parameter, region } = gradient
    const bytes = region.bytes + run.parameter(parameter).update_bytes
    this.bytes += bytes
    const work = this.#answer(gradient).finally(() => {
      this.bytes -= bytes
      this.#outstanding.delete(parameter)
    })
    this.#outstanding.set(parameter, work)
  }

  async #answer({ run, member, step, parameter: index, region: gradient, ready }: Gradient): Promise<void> {
    try {
      if (ready) await ready
      const update = await run.compute(member, { step, index, gradient })
      if (update) await this.#send(step, index, update).finally(() => update.memory.release())
    } catch (error) {
      countRefused(this.#means.metrics, error)
      this.#report(error)
    }
  }

  async #send(step: Step, parameter: number, update: ScaledUpdate): Promise<void> {
    const startedAt = performance.now()
    const { config, metrics } = this.#means
    const { memory, scale, decay, row_scale, replayed, gradient_norm, update_rms } = update
    const keys = { scale, decay, row_scale, replayed, gradient_norm, update_rms }
    const sent = [...chunksOf(memory.bytes, config.chunk_bytes)].map(async ({ offset, length }) => {
      const first = offset === 0 ? keys : {}
      const header = encodeHeader({ type: 'update', parameter, step: step.number, offset, ...first }, length)
      const whole = await this.#sender.send({ header, payload: memory.chunk(offset, length) })
      if (whole) metrics.sent_bytes_total.inc(length)
    })
    await Promise.all(sent)
    step.spend('send', (performance.now() - startedAt) / 1000)
  }
}

export function countRefused(metrics: Metrics, error: unknown): void {
  metrics.refused_gradients_total.inc({ code: error instanceof ServiceError ? error.code : 'INTERNAL' })
}
