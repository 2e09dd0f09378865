import assert from 'node:assert'
import type { Region } from '../device/region.js'
import { ServiceError } from '../errors.js'
import { inSlices, turn } from '../run/slices.js'
import type { Receiver } from '../run/step/part.js'
import type { Step } from '../run/step/step.js'
import { Assembly } from '../wire/chunks.js'
import type { GradientHead } from '../wire/codec.js'
import type { GradientFrame, GradientsFrame } from '../wire/frame.js'
import type { Chunk } from '../wire/ranges.js'
import { type Answers, countRefused, type Joined, type Means } from './answers.js'
import { type Asked, IncompleteGradient } from './incomplete-gradient.js'
import type { SharedArenas } from './transport.js'
import type { GradientSink } from './websocket/socket.js'

// To begin so many takes a few milliseconds.
const GRADIENTS_PER_TURN = 256
// Enough to keep every lane busy. What has begun is held in small objects, and those that live long cost the collector
// of garbage more than the work itself.
const MOST_UNDER_WAY = 512

/** A gradient that was refused: the rest of its chunks is dropped. */
type Dropped = { parameter: number; step: number }

/** The bytes of a chunk, and where they lie in the tensor. */
type Stored = { pieces: Iterable<Chunk>; data: Uint8Array }

/** Begins a gradient in its memory; a promise where nothing else may be looked at before that is done. */
type Start = (receiver: Receiver) => Promise<void> | undefined

/** What a reception works with beside the means of its connection. */
export type ReceptionParts = {
  /** Takes each gradient over that is complete. */
  answers: Pick<Answers, 'begin' | 'outstanding' | 'fewerThan'>
  /** Aborted when the connection ends. */
  gone: AbortSignal
  /** Told of a gradient in shared memory that is not taken; the frame's others are. */
  refused(error: unknown): void
  /** Throws where no gradient may begin at all. */
  checkOpen(gradient: Dropped): void
  /** Told when the memory that `destination` has named may not be written any more. */
  abandoned(): void
  /** Told of the bytes of gradients that lie in shared memory: they count as if the socket had carried them. */
  shared(bytes: number): void
  /** Told when `destination` names other memory from now on, also for the chunk that is coming. */
  redirected(destination: (head: GradientHead) => Uint8Array): void
}

/** The gradient that a connection is sending: its chunks go into a region that is reserved for all of it. */
export class Reception implements GradientSink {
  readonly #means: Means
  readonly #parts: ReceptionParts
  #incomplete: IncompleteGradient | undefined
  #dropped: Dropped | undefined

  constructor(means: Means, parts: ReceptionParts) {
    this.#means = means
    this.#parts = parts
  }

  /** Whose gradient is incomplete, in words; undefined where none is. */
  get label(): string | undefined {
    return this.#incomplete?.assembly.label
  }

  /** Bytes that the incomplete gradient has reserved. */
  get bytes(): number {
    return this.#incomplete?.region.bytes ?? 0
  }

  /** When the incomplete gradient got its memory, by performance.now(); undefined where there is none. */
  get startedAt(): number | undefined {
    return this.#incomplete?.startedAt
  }

  /**
   * Begins the gradient whose first chunk is about to come. Where it has to wait, or is wrong, nothing happens: the
   * chunk then comes the ordinary way, which waits, or refuses it.
   */
  prepare({ run, member }: Joined, { parameter, step: number, offset, dataLength }: GradientHead): void {
    const known = run.parameters[parameter]
    if (this.#incomplete || known === undefined || this.#parts.answers.outstanding(parameter)) return
    const extent = member.gradient(known)
    if (offset !== extent.offsetOf(0) || dataLength > Math.min(extent.bytes, this.#means.config.chunk_bytes)) return
    try {
      this.#parts.checkOpen({ parameter, step: number })
      const step = run.intake.expect(member, parameter, number)
      const receiver =
        run.intake.receive(member, parameter, step) ?? reserved(run.staging.tryReserve(known.gradient_bytes))
      const assembly = new Assembly(extent, gradientLabel(known.name, number))
      if (receiver) this.#hold(new IncompleteGradient({ run, member, step, parameter }, { assembly, ...receiver }))
    } catch {
      // The ordinary way meets the same error, and tells it.
    }
  }

  destination({ parameter, step, offset, dataLength }: GradientHead): Uint8Array | undefined {
    const incomplete = this.#incomplete
    if (!incomplete?.is(parameter, step) || dataLength > this.#means.config.chunk_bytes) return undefined
    return incomplete.destination({ offset, length: dataLength })
  }

  received({ offset, dataLength }: GradientHead): void {
    assert(this.#incomplete, 'whoever ends a reception abandons the destination')
    this.#incomplete.assembly.accept({ offset, length: dataLength })
    this.#stored(this.#incomplete, dataLength)
  }

  /**
   * Takes a chunk that has come the ordinary way; a promise where nothing else may be looked at before it is stored.
   */
  take(joined: Joined, frame: GradientFrame): Promise<void> | undefined {
    const { parameter, step, offset } = frame
    const isRefused = this.#dropped?.parameter === parameter && this.#dropped.step === step
    if (isRefused && offset > firstOffset(joined, parameter)) return undefined
    this.#dropped = undefined
    if (!this.#incomplete) return this.#begin(joined, frame)
    this.#continue(this.#incomplete, frame)
    return undefined
  }

  /**
   * Takes gradients that lie in memory that the client shares, one after the other, each with a refusal of its own. A
   * promise where nothing else may be looked at before all of them have begun.
   */
  async takeShared(joined: Joined, { step, parameters }: GradientsFrame, arenas: SharedArenas): Promise<void> {
    const { jobs } = this.#means.device.backend.group
    const declared = parameters.flatMap((index) => joined.run.parameters[index] ?? [])
    this.#parts.shared(declared.reduce((sum, parameter) => sum + joined.member.gradient(parameter).bytes, 0))
    for (const [i, parameter] of parameters.entries()) {
      if (i % GRADIENTS_PER_TURN === GRADIENTS_PER_TURN - 1) await this.#turn(joined)
      // A lane gets what has begun so far once a group of it is full, and computes while the others begin.
      else if (i % jobs === jobs - 1) await undefined
      if (this.#parts.gone.aborted) return
      try {
        const waits = this.#beginShared(joined, { parameter, step }, arenas)
        if (waits) await waits
      } catch (error) {
        countRefused(this.#means.metrics, error)
        this.#parts.refused(error)
      }
    }
  }

  /** A member does not wait for its updates: others may have to send their parts first, and they may wait for it. */
  async #turn({ run }: Joined): Promise<void> {
    await turn()
    if (!run.intake.gathers) await this.#parts.answers.fewerThan(MOST_UNDER_WAY)
  }

  /** A promise where the gradient has to wait. */
  #beginShared(joined: Joined, { parameter, step: number }: Dropped, arenas: SharedArenas): Promise<void> | undefined {
    const { run, member } = joined
    if (run.intake.drops(member, number)) return undefined
    const declared = run.parameter(parameter)
    const { bytes } = member.gradient(declared)
    if (bytes === 0) {
      const message = `${member.name} has no elements of parameter '${declared.name}', and sends a gradient of it`
      throw new ServiceError('SHAPE_MISMATCH', message, { parameter, step: number })
    }
    this.#parts.checkOpen({ parameter, step: number })
    const step = run.intake.expect(member, parameter, number)
    if (run.intake.gathers)
      return this.#startIn(joined, { parameter, step }, (receiver) =>
        this.#gather({ run, member, step, parameter }, receiver, arenas),
      )
    const begin = (places: { region: Region; source?: Region }): undefined => {
      this.#means.metrics.received_bytes_total.inc(bytes)
      this.#parts.answers.begin({ run, member, step, parameter, ...places, target: () => arenas.update(parameter) })
    }
    const outstanding = this.#parts.answers.outstanding(parameter)
    /* c8 ignore start -- needs a GPU: npm run test:gpu */
    if (this.#means.device.copiesShared && run.journal === undefined) {
      const direct = () => begin({ region: arenas.gradient(parameter) })
      return outstanding ? outstanding.then(direct) : void direct()
    }
    /* c8 ignore stop */
    // The host computes on bytes that nobody changes, and the journal keeps the same.
    const copied = ({ region }: Receiver) => begin({ region, source: arenas.gradient(parameter) })
    return this.#startIn(joined, { parameter, step }, copied)
  }

  /** Copies a member's part from its slot to where the parts of all members come together. */
  #gather(of: Asked, receiver: Receiver, arenas: SharedArenas): Promise<void> | undefined {
    const { run, member, step, parameter } = of
    const declared = run.parameter(parameter)
    const assembly = new Assembly(member.gradient(declared), gradientLabel(declared.name, step.number))
    const part = new IncompleteGradient(of, { assembly, ...receiver })
    const slot = arenas.gradient(parameter)
    const begin = (isWhole: boolean): undefined => {
      slot.release()
      /* c8 ignore next -- the member is lost while a part of many megabytes is copied */
      if (!isWhole) return void part.region.release()
      this.#means.metrics.received_bytes_total.inc(assembly.received)
      step.spend('receive', (performance.now() - part.startedAt) / 1000)
      this.#parts.answers.begin({ ...part.complete(), slot: () => arenas.update(parameter) })
    }
    const copied = inSlices(part.copying(slot))
    /* c8 ignore next -- whether copying takes more than a turn of the event loop is the machine's affair */
    return copied instanceof Promise ? copied.then(begin) : begin(copied)
  }

  /** Another frame has come: later chunks belong to no refused gradient any more. */
  forgetDropped(): void {
    this.#dropped = undefined
  }

  /** Gives up the incomplete gradient and its memory. */
  abandon(): void {
    this.#parts.abandoned()
    this.#forget()?.region.release()
  }

  #continue(incomplete: IncompleteGradient, frame: GradientFrame): void {
    const { parameter, step, offset, data } = frame
    if (!incomplete.is(parameter, step)) {
      throw new ServiceError(
        'FRAME_UNEXPECTED',
        `a chunk of parameter ${parameter}, step ${step} while ${incomplete.assembly.label} is incomplete`,
      )
    }
    let pieces: Iterable<Chunk>
    try {
      pieces = incomplete.assembly.accept({ offset, length: data.length })
    } catch (error) {
      this.abandon()
      this.#dropped = { parameter, step }
      countRefused(this.#means.metrics, error)
      throw error
    }
    this.#store(incomplete, { pieces, data })
  }

  /** Takes a gradient's first chunk: checks that it may be applied, and reserves memory for all of it. */
  #begin(joined: Joined, frame: GradientFrame): Promise<void> | undefined {
    const { run, member } = joined
    const { parameter, step: number, offset, data } = frame
    const first = firstOffset(joined, parameter)
    if (run.intake.drops(member, number)) return undefined
    if (offset === first) this.#dropped = { parameter, step: number }
    const declared = run.parameter(parameter)
    const assembly = new Assembly(member.gradient(declared), gradientLabel(declared.name, number))
    if (offset !== first) assembly.accept({ offset, length: data.length })
    this.#parts.checkOpen({ parameter, step: number })
    const { step, pieces } = this.#counted(() => {
      const step = run.intake.expect(member, parameter, number)
      return { step, pieces: assembly.accept({ offset, length: data.length }) }
    })
    const start = (receiver: Receiver): undefined => {
      const incomplete = new IncompleteGradient({ run, member, step, parameter }, { assembly, ...receiver })
      this.#hold(incomplete)
      this.#store(incomplete, { pieces, data })
    }
    return this.#counted(() => this.#startIn(joined, { parameter, step }, start))?.catch((error) => this.#refuse(error))
  }

  /**
   * Calls `start` with memory for a gradient: at once, or when there is some. A promise where nothing else may be
   * looked at before.
   */
  #startIn(
    { run, member }: Joined,
    { parameter, step }: { parameter: number; step: Step },
    start: Start,
  ): Promise<void> | undefined {
    const { name, gradient_bytes } = run.parameter(parameter)
    const of = { parameter, step: step.number }
    const lack = (error: unknown): never => {
      throw lackOf(error, gradientLabel(name, of.step), of)
    }
    run.intake.withdraw(member, parameter)
    const outstanding = this.#parts.answers.outstanding(parameter)
    const receiver = outstanding ? undefined : run.intake.receive(member, parameter, step)
    if (receiver) return start(receiver)
    const region = outstanding ? undefined : tried(() => run.staging.tryReserve(gradient_bytes), lack)
    if (region) return start({ region })
    const reserve = async (): Promise<Receiver | undefined> => {
      const receiver = run.intake.receive(member, parameter, step)
      if (receiver) return receiver
      return reserved(await run.staging.reserve(gradient_bytes, this.#parts.gone).catch(lack))
    }
    return this.#startWhenFree(outstanding, reserve, start)
  }

  /** Does `work`; where it throws, a gradient was refused. */
  #counted<T>(work: () => T): T {
    try {
      return work()
    } catch (error) {
      return this.#refuse(error)
    }
  }

  /** Throws an error by which a gradient was refused. */
  #refuse(error: unknown): never {
    countRefused(this.#means.metrics, error)
    throw error
  }

  // One update per parameter is kept, so the same parameter again waits until that was sent.
  async #startWhenFree(
    outstanding: Promise<void> | undefined,
    reserve: () => Promise<Receiver | undefined>,
    start: Start,
  ): Promise<void> {
    await outstanding
    const receiver = await reserve()
    if (receiver === undefined) return
    /* c8 ignore next -- the connection may end in the very turn in which memory is granted */
    if (this.#parts.gone.aborted) return receiver.region.release()
    await start(receiver)
  }

  /** Holds a gradient from its first chunk on. */
  #hold(incomplete: IncompleteGradient): void {
    const { staging } = this.#means.device
    this.#dropped = undefined
    this.#incomplete = incomplete
    if (staging.has(incomplete.region)) staging.pressed.add(this.#makeRoom)
  }

  #forget(): IncompleteGradient | undefined {
    const incomplete = this.#incomplete
    this.#incomplete = undefined
    this.#means.device.staging.pressed.delete(this.#makeRoom)
    return incomplete
  }

  /** Others lack room in the arena: a gradient that comes slowly goes on in its run's own memory. */
  readonly #makeRoom = (): void => {
    const incomplete = this.#incomplete
    if (!incomplete?.isSlow(performance.now())) return
    const to = incomplete.run.staging.tryReserveOwn(incomplete.region.bytes)
    if (to === undefined) return
    this.#means.device.staging.pressed.delete(this.#makeRoom)
    this.#parts.redirected(({ offset, dataLength }) => to.chunk(offset, dataLength))
    incomplete.move(to)
  }

  #store(incomplete: IncompleteGradient, { pieces, data }: Stored): void {
    incomplete.store(pieces, data)
    this.#stored(incomplete, data.length)
  }

  #stored({ assembly, startedAt }: IncompleteGradient, bytes: number): void {
    this.#means.metrics.received_bytes_total.inc(bytes)
    if (!assembly.complete) return
    const gradient = this.#forget()?.complete()
    assert(gradient, 'what was stored belongs to the incomplete gradient')
    gradient.step.spend('receive', (performance.now() - startedAt) / 1000)
    this.#parts.answers.begin(gradient)
  }
}

/** Where a member's part of a gradient begins in the tensor; 0 for a parameter that the run does not have. */
function firstOffset({ run, member }: Joined, index: number): number {
  const parameter = run.parameters[index]
  return parameter ? member.gradient(parameter).offsetOf(0) : 0
}

function reserved(region: Region | undefined): Receiver | undefined {
  return region && { region }
}

function gradientLabel(name: string, step: number): string {
  return `the gradient of parameter '${name}' for step ${step}`
}

function tried<T>(work: () => T, otherwise: (error: unknown) => never): T {
  try {
    return work()
  } catch (error) {
    return otherwise(error)
  }
}

/** An error of reserving memory, told of the gradient that the memory was for. */
function lackOf(error: unknown, label: string, of: Dropped): unknown {
  /* c8 ignore next -- a bug of ours is told as one */
  if (!(error instanceof ServiceError)) return error
  return new ServiceError('OVER_CAPACITY', `there is no memory for ${label}: ${error.message}`, of)
}
