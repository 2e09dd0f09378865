import type { Config } from '../config.js'
import type { Device } from '../device/device.js'
import type { Region } from '../device/region.js'
import { ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import type { Member } from '../run/members/member.js'
import type { GradientPlaces } from '../run/place.js'
import type { Run } from '../run/run.js'
import type { ScaledUpdate } from '../run/shard.js'
import type { Repeated } from '../run/step/part.js'
import type { Step } from '../run/step/step.js'
import { encodeFrame, encodeHeader } from '../wire/codec.js'
import type { UpdatesFrame } from '../wire/frame.js'
import type { Chunk, Cut, Extent } from '../wire/ranges.js'
import type { Message, Sender } from './websocket/sender.js'

// An entry takes 50 bytes, and with QK-clip those of its row scales: a frame stays far below its limit.
const UPDATES_PER_FRAME = 512

/** What a connection works with. */
export type Means = { config: Config; device: Device; metrics: Metrics }

/** A run that a connection has opened, and the connection as a member of it. */
export type Joined = { run: Run; member: Member }

/**
 * A member's part of a gradient, whole in the region of the gradient, once `ready` has settled if it is there. The
 * region is one of the staging arena or of the run's own memory, or of memory that the client shares. The run that
 * computes it takes the region over.
 */
export type Gradient = Joined & {
  step: Step
  parameter: number
  region: Region
  ready?: Promise<void>
  repeated?: Repeated
} & Omit<GradientPlaces, 'gradient'>

/** An update of a step that was closed without a member's replica. */
type MissedUpdate = { step: Step; index: number; update: ScaledUpdate }

/** Has one connection's gradients computed and sends their updates, at most one of a parameter at a time. */
export class Answers {
  /** Bytes of gradients that are being computed and of updates that were not sent yet. */
  bytes = 0
  readonly #means: Means
  readonly #sender: Sender
  readonly #report: (error: unknown) => void
  #outstanding = new Map<number, Promise<void>>()
  /** Called when a gradient is done with that was under way. */
  #onDone: (() => void) | undefined
  /** Updates in shared memory that the client is told of in the next turn of the event loop, many in one frame. */
  #ready: Ready[] = []

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

  /** Resolves once fewer than `most` gradients are under way. */
  async fewerThan(most: number): Promise<void> {
    while (this.#outstanding.size >= most) {
      await new Promise<void>((resolve) => {
        this.#onDone = resolve
      })
    }
  }

  async settled(): Promise<void> {
    await Promise.all(this.#outstanding.values())
  }

  /** Takes the gradient over. */
  begin(gradient: Gradient): void {
    const { run, member, parameter } = gradient
    const declared = run.parameter(parameter)
    const bytes = member.gradient(declared).bytes + member.update(declared).bytes
    this.bytes += bytes
    const work = this.#answer(gradient).finally(() => {
      this.bytes -= bytes
      this.#outstanding.delete(parameter)
      this.#onDone?.()
    })
    this.#outstanding.set(parameter, work)
  }

  async #answer(given: Gradient): Promise<void> {
    const { run, member, step, parameter: index } = given
    try {
      const update = await updateOf(given, this.#means.metrics)
      if (!update) return
      const extent = member.update(run.parameter(index))
      const sent = given.target ? this.#tell(step, index, update) : this.#send(step, { index, extent }, update)
      await sent.finally(() => update.memory.release())
    } catch (error) {
      countRefused(this.#means.metrics, error)
      this.#report(error)
    }
  }

  /** Tells the client of an update in its memory, together with all others of this turn. */
  #tell(step: Step, parameter: number, update: ScaledUpdate): Promise<void> {
    return new Promise((resolve) => {
      this.#ready.push({ step, parameter, update, told: resolve })
      if (this.#ready.length === 1) setImmediate(() => void this.#tellReady())
    })
  }

  async #tellReady(): Promise<void> {
    const ready = this.#ready.splice(0)
    const startedAt = performance.now()
    for (const replayed of [true, false]) {
      const alike = ready.filter(({ update }) => update.replayed === replayed)
      for (let at = 0; at < alike.length; at += UPDATES_PER_FRAME)
        await this.#sendReady(alike.slice(at, at + UPDATES_PER_FRAME))
    }
    ready[0].step.spend('send', (performance.now() - startedAt) / 1000)
  }

  async #sendReady(ready: readonly Ready[]): Promise<void> {
    await this.#sender.send({ header: encodeFrame(frameOf(ready)) })
    for (const { update, told } of ready) {
      this.#means.metrics.sent_bytes_total.inc(update.memory.bytes)
      told()
    }
  }

  /** Sends a member its elements of an update that it has missed. */
  sendMissed({ run, member }: Joined, { step, index, update }: MissedUpdate): Promise<void> {
    return this.#send(step, { index, extent: member.update(run.parameter(index)) }, update)
  }

  /** Sends the elements of an update that the member has. The factors are in its first frame. */
  async #send(step: Step, { index, extent }: { index: number; extent: Extent }, update: ScaledUpdate): Promise<void> {
    const startedAt = performance.now()
    const { config, metrics } = this.#means
    const { memory, scale, decay, row_scale, replayed, gradient_norm, update_rms } = update
    const keys = { scale, decay, row_scale, replayed, gradient_norm, update_rms }
    const head = { type: 'update', parameter: index, step: step.number } as const
    const sent = [...extent.cuts(config.chunk_bytes)].map(async (cut, i) => {
      const header = encodeHeader({ ...head, offset: cut.offset, ...(i === 0 && keys) }, cut.length)
      const whole = await this.#sender.send({ header, payload: payloadOf(memory, cut) })
      if (whole) metrics.sent_bytes_total.inc(cut.length)
    })
    await Promise.all(sent)
    step.spend('send', (performance.now() - startedAt) / 1000)
  }
}

/** The bytes of a frame: those of the memory itself, or a copy of several short pieces. */
function payloadOf(memory: Region, { pieces: [first, ...rest] }: Cut): Message['payload'] {
  const bytes = ({ offset, length }: Chunk) => memory.chunk(offset, length)
  return rest.length === 0 ? bytes(first) : () => Buffer.concat([first, ...rest].map(bytes))
}

/** An update that lies in shared memory; `told` is called once the client knows. */
type Ready = { step: Step; parameter: number; update: ScaledUpdate; told: () => void }

/** One frame for updates of one step that are all replayed, or all not. */
function frameOf(ready: readonly Ready[]): UpdatesFrame {
  const [{ step, update }] = ready
  const scaled = ready.flatMap(({ parameter, update: { row_scale } }) => (row_scale ? [[parameter, row_scale]] : []))
  const list = (key: 'scale' | 'decay' | 'gradient_norm' | 'update_rms') => ready.map(({ update }) => update[key])
  return {
    ...{ type: 'updates', step: step.number, replayed: update.replayed },
    parameters: ready.map(({ parameter }) => parameter),
    ...{ scale: list('scale'), decay: list('decay') },
    ...{ gradient_norm: list('gradient_norm'), update_rms: list('update_rms') },
    ...(scaled.length > 0 && { row_scale: Object.fromEntries(scaled) }),
  }
}

/** The update of a gradient, which is taken over; undefined where the member that sent it has lost the run. */
export async function updateOf(gradient: Gradient, metrics: Metrics): Promise<ScaledUpdate | undefined> {
  const { run, parameter: index, region, ready, ...rest } = gradient
  if (ready) await ready
  const update = await run.intake.compute({ ...rest, index, gradient: region })
  if (update?.replayed) metrics.replayed_updates_total.inc()
  return update
}

export function countRefused(metrics: Metrics, error: unknown): void {
  metrics.refused_gradients_total.inc({ code: error instanceof ServiceError ? error.code : 'INTERNAL' })
}
