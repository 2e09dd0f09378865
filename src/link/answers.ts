import type { Config } from '../config.js'
import type { Device } from '../device/device.js'
import type { Region } from '../device/region.js'
import { ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import type { Member } from '../run/members/member.js'
import { answered, type GradientPlaces, type Update } from '../run/place.js'
import type { Run } from '../run/run.js'
import { inSlices } from '../run/slices.js'
import type { Repeated } from '../run/step/part.js'
import type { Step } from '../run/step/step.js'
import { Underway } from '../underway.js'
import { encodeFrame, encodeHeader } from '../wire/codec.js'
import type { UpdatesFrame } from '../wire/frame.js'
import type { Chunk, Cut, Extent } from '../wire/ranges.js'
import type { Message, Sender } from './websocket/sender.js'

// An entry takes 50 bytes, and with QK-clip those of its row scales: a frame stays far below its limit.
const UPDATES_PER_FRAME = 512
// Copying this many bytes takes about a millisecond.
const COPY_BYTES = 4 << 20

/** What a connection works with. */
export type Means = { config: Config; device: Device; metrics: Metrics }

/** A run that a connection has opened, and the connection as a member of it. */
export type Joined = { run: Run; member: Member }

/**
 * A member's part of a gradient, whole in the region of the gradient, once `ready` has settled if it is there. The
 * region is one of the staging arena or of the run's own memory, or of memory that the client shares.
 */
export type Gradient = Joined & {
  step: Step
  parameter: number
  region: Region
  ready?: Promise<void>
  repeated?: Repeated
  /** Where the client finds a member's elements of the update, one behind the other, in memory that it shares. */
  slot?: () => Region
} & Pick<GradientPlaces, 'source' | 'target'>

/** An update of a step that was closed without a member's replica. */
type MissedUpdate = { step: Step; index: number; update: Update }

/** Has one connection's gradients computed and sends their updates, at most one of a parameter at a time. */
export class Answers {
  /** Bytes of gradients that are being computed and of updates that were not sent yet. */
  bytes = 0
  readonly #means: Means
  readonly #sender: Sender
  readonly #report: (error: unknown) => void
  readonly #outstanding = new Map<number, Outstanding>()
  readonly #underway = new Underway()
  /** Updates in shared memory that the client is told of in the next turn of the event loop, many in one frame. */
  #ready: Ready[] = []

  /** `report` tells the client of a refusal. */
  constructor(means: Means, sender: Sender, report: (error: unknown) => void) {
    this.#means = means
    this.#sender = sender
    this.#report = report
  }

  get busy(): boolean {
    return this.#underway.count > 0
  }

  /** Settles when the update of a parameter has left its memory; undefined where there is none. */
  outstanding(parameter: number): Promise<void> | undefined {
    const outstanding = this.#outstanding.get(parameter)
    if (!outstanding) return undefined
    return new Promise((resolve) => {
      outstanding.told.push(resolve)
    })
  }

  /** Resolves once fewer than `most` gradients are under way. */
  fewerThan(most: number): Promise<void> {
    return this.#underway.below(most)
  }

  settled(): Promise<void> {
    return this.#underway.below(1)
  }

  /** Takes the gradient over. */
  begin(gradient: Gradient): void {
    const { run, member, parameter, ready } = gradient
    const declared = run.parameter(parameter)
    const bytes = member.gradient(declared).bytes + member.update(declared).bytes
    const outstanding = { gradient, bytes, told: [] }
    this.bytes += bytes
    this.#underway.begin()
    this.#outstanding.set(parameter, outstanding)
    if (ready) void ready.then(() => this.#compute(outstanding))
    else this.#compute(outstanding)
  }

  #compute(outstanding: Outstanding): void {
    const { run, member, step, parameter: index, region: gradient, repeated, source, target } = outstanding.gradient
    const release = () => {
      gradient.release()
      source?.release()
    }
    run.intake.compute(
      { member, step, index, gradient, repeated, source, target },
      {
        resolve: (update) => {
          release()
          if (update && !member.lost) return this.#answer(outstanding, update)
          // The memory that a member shares goes with its connection.
          update?.memory.release()
          this.#end(outstanding)
        },
        reject: (error) => {
          release()
          countRefused(this.#means.metrics, error)
          this.#report(error)
          this.#end(outstanding)
        },
      },
    )
  }

  #answer(outstanding: Outstanding, update: Update): void {
    const { gradient } = outstanding
    if (update.replayed) this.#means.metrics.replayed_updates_total.inc()
    const { run, member, step, parameter: index } = gradient
    const extent = member.update(run.parameter(index))
    if (gradient.target) return this.#tell({ outstanding, update, bytes: extent.bytes })
    if (gradient.slot) return void this.#fill(gradient.slot(), { outstanding, update, bytes: extent.bytes })
    this.#send(step, { index, extent }, update).then(
      () => this.#release({ outstanding, update }),
      /* c8 ignore next 4 -- a bug of ours is told as one */
      (error) => {
        this.#release({ outstanding, update })
        this.#report(error)
      },
    )
  }

  /** Copies a member's elements of an update to where the client finds them, and tells it. */
  async #fill(slot: Region, ready: Ready): Promise<void> {
    const { run, member, parameter } = ready.outstanding.gradient
    const extent = member.update(run.parameter(parameter))
    const isThere = await inSlices(filling(slot, ready.update.memory, { extent, member }))
    if (isThere) return this.#tell(ready)
    /* c8 ignore next 2 -- the member is lost while an update of many megabytes is copied */
    this.#release(ready)
  }

  #release({ outstanding, update }: Pick<Ready, 'outstanding' | 'update'>): void {
    update.memory.release()
    this.#end(outstanding)
  }

  #end({ gradient, bytes, told }: Outstanding): void {
    this.bytes -= bytes
    this.#outstanding.delete(gradient.parameter)
    this.#underway.end()
    for (const tell of told) tell()
  }

  /** Tells the client of an update in its memory, together with all others of this turn. */
  #tell(ready: Ready): void {
    this.#ready.push(ready)
    if (this.#ready.length === 1) setImmediate(() => void this.#tellReady())
  }

  async #tellReady(): Promise<void> {
    const ready = this.#ready.splice(0)
    const startedAt = performance.now()
    for (const replayed of [true, false]) {
      const alike = ready.filter(({ update }) => update.replayed === replayed)
      for (let at = 0; at < alike.length; at += UPDATES_PER_FRAME)
        await this.#sendReady(alike.slice(at, at + UPDATES_PER_FRAME))
    }
    ready[0].outstanding.gradient.step.spend('send', (performance.now() - startedAt) / 1000)
  }

  async #sendReady(ready: readonly Ready[]): Promise<void> {
    await this.#sender.send({ header: encodeFrame(frameOf(ready)) })
    this.#means.metrics.sent_bytes_total.inc(ready.reduce((sum, { bytes }) => sum + bytes, 0))
    for (const one of ready) this.#release(one)
  }

  /** Sends a member its elements of an update that it has missed. */
  sendMissed({ run, member }: Joined, { step, index, update }: MissedUpdate): Promise<void> {
    return this.#send(step, { index, extent: member.update(run.parameter(index)) }, update)
  }

  /** Sends the elements of an update that the member has. The factors are in its first frame. */
  async #send(step: Step, { index, extent }: { index: number; extent: Extent }, update: Update): Promise<void> {
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

/** A gradient from its last byte until its update has left its memory; `told` are called then. */
type Outstanding = { readonly gradient: Gradient; readonly bytes: number; readonly told: (() => void)[] }

/** An update of which `bytes` lie in shared memory. */
type Ready = { readonly outstanding: Outstanding; readonly update: Update; readonly bytes: number }

/**
 * Copies a member's elements of an update to their slot in memory that the client shares, and releases the slot.
 * Answers false, with the rest left out, once the member is lost: whoever takes its place may have the same memory.
 */
function* filling(slot: Region, memory: Region, { extent, member }: { extent: Extent; member: Member }) {
  let position = 0
  for (const cut of extent.cuts(COPY_BYTES)) {
    /* c8 ignore next -- the member is lost while an update of many megabytes is copied */
    if (member.lost) break
    for (const { offset, length } of cut.pieces) {
      slot.chunk(position, length).set(memory.chunk(offset, length))
      position += length
    }
    yield
  }
  slot.release()
  return position === extent.bytes
}

/** One frame for updates of one step that are all replayed, or all not. */
function frameOf(ready: readonly Ready[]): UpdatesFrame {
  const [{ outstanding, update }] = ready
  const list = (key: 'scale' | 'decay' | 'gradient_norm' | 'update_rms') => ready.map(({ update }) => update[key])
  const parameters = ready.map(({ outstanding }) => outstanding.gradient.parameter)
  const scaled = ready.flatMap(({ update: { row_scale } }, i) => (row_scale ? [[parameters[i], row_scale]] : []))
  return {
    ...{ type: 'updates', step: outstanding.gradient.step.number, replayed: update.replayed, parameters },
    ...{ scale: list('scale'), decay: list('decay') },
    ...{ gradient_norm: list('gradient_norm'), update_rms: list('update_rms') },
    ...(scaled.length > 0 && { row_scale: Object.fromEntries(scaled) }),
  }
}

/** The update of a gradient, which is taken over; undefined where the member that sent it has lost the run. */
export async function updateOf(gradient: Gradient, metrics: Metrics): Promise<Update | undefined> {
  const { run, member, step, parameter: index, region, ready, repeated } = gradient
  /* c8 ignore next -- a gradient moves when another run lacks room */
  if (ready) await ready
  const part = { member, step, index, gradient: region, repeated }
  const update = await answered((answer) => run.intake.compute(part, answer)).finally(() => region.release())
  if (update?.replayed) metrics.replayed_updates_total.inc()
  return update
}

export function countRefused(metrics: Metrics, error: unknown): void {
  metrics.refused_gradients_total.inc({ code: error instanceof ServiceError ? error.code : 'INTERNAL' })
}
