import type { ShardPoint, ShardState } from '../../src/cluster/recovery.js'
import type { Vote } from '../../src/cluster/vote.js'
import { ServiceError } from '../../src/errors.js'
import { FIRST_DIGEST } from '../../src/run/digest.js'
import { receiptOf, recordOf } from '../cluster/records.js'
import { digestAfter, type Monitor } from './monitor.js'
import type { KeptPoint, ShardStore } from './stores.js'
import type { Actor } from './world.js'

/** Every so many steps a shard takes a checkpoint by itself. */
const CHECKPOINT_STEPS = 2

export type ShardParts = {
  readonly index: number
  readonly parameters: readonly number[]
  readonly actor: Actor
  readonly store: ShardStore
  readonly monitor: Monitor
  readonly journal: boolean
  readonly moves: boolean
  /** A bug for the simulation to find: it votes before its journal has the step. */
  readonly votesEarly: boolean
  /** Another: a late copy of the head's request has it opened again. */
  readonly opensAgain: boolean
  /** Has the head know of a vote. */
  vote(vote: Vote): void
}

const FIRST: KeptPoint = { step: 0, digest: FIRST_DIGEST, previous: FIRST_DIGEST, variant: 0 }

/** A shard in the memory of a process: as much of a run as the head is concerned with. */
export class SimulatedShard {
  generation = 0
  #point = FIRST
  #writing: { readonly point: KeptPoint; readonly done: Promise<string> } | undefined
  #opened: Promise<ShardState> | undefined
  #hasGoneBack = false
  #restored: Promise<void> | undefined
  #checkpoints: readonly KeptPoint[] = [FIRST]
  readonly #parts: ShardParts

  constructor(parts: ShardParts) {
    this.#parts = parts
  }

  get step(): number {
    return this.#point.step
  }

  get digest(): string {
    return this.#point.digest
  }

  /**
   * The head has this shard opened with a generation. Asked again it changes nothing: the request may be a late copy,
   * and the shard be further by now.
   */
  open(generation: number, standing: ShardPoint): Promise<ShardState> {
    if (generation < this.generation) throw stale(generation, this.generation)
    if (!this.#opened || generation > this.generation || this.#parts.opensAgain)
      this.#opened = this.#load(generation, standing)
    return this.#opened
  }

  /**
   * State in memory that does not lead on from where the head is gives way to what is kept: with a journal that is
   * where the head is.
   */
  async #load(generation: number, standing: ShardPoint): Promise<ShardState> {
    this.generation = generation
    this.#hasGoneBack = false
    const { store, actor, index } = this.#parts
    const kept = await store.read(actor, index)
    this.#check(generation)
    this.#restored = Promise.resolve()
    this.#checkpoints = [FIRST, ...kept.checkpoints]
    const { digest, previous, step } = this.#point
    const isThere = digest === standing.digest || (previous === standing.digest && step === standing.step + 1)
    if (!isThere) {
      const points = [...this.#checkpoints, ...kept.journal]
      this.#point = points.find((point) => point.digest === standing.digest) ?? newest(this.#checkpoints)
    }
    return { ...this.#point, checkpoints: this.#checkpoints }
  }

  /** Goes back to a checkpoint, once in a generation. */
  async goTo(generation: number, digest: string): Promise<void> {
    const { store, actor, index, moves } = this.#parts
    this.#check(generation)
    const point = this.#checkpoints.find((one) => one.digest === digest)
    if (!point) throw new ServiceError('NOT_FOUND', `shard ${index} has no checkpoint ${digest}`)
    // Where processes share a store another one may have gone on from there.
    if (!moves) await store.drop(actor, index, point.step)
    this.#check(generation)
    if (!this.#hasGoneBack) this.#point = point
    this.#hasGoneBack = true
  }

  /**
   * A trainer opens the shard under the eyes of the head, which is there or one step behind; it is brought back from the
   * disk first. Throws STEP_CONFLICT for a shard that is elsewhere.
   */
  async admit(generation: number, at: ShardPoint): Promise<ShardPoint> {
    this.#restored ??= this.#restore()
    await this.#restored
    /* c8 ignore next -- few schedules have a late copy of a request come behind a newer generation */
    if (generation < this.generation) throw stale(generation, this.generation)
    this.generation = generation
    const { step, digest, previous } = this.#point
    const isAhead = step === at.step + 1 && previous === at.digest
    if (!isAhead && digest !== at.digest)
      throw new ServiceError('STEP_CONFLICT', `shard ${this.#parts.index} is at step ${step}, the whole at ${at.step}`)
    if (isAhead) this.#voted()
    return this.#point
  }

  async #restore(): Promise<void> {
    const { store, actor, index } = this.#parts
    try {
      const kept = await store.read(actor, index)
      this.#point = newest([FIRST, ...kept.checkpoints, ...kept.journal])
      /* c8 ignore next 4 -- few schedules have a disk refuse just then */
    } catch (error) {
      this.#restored = undefined
      throw error
    }
  }

  /** A trainer opens the shard. */
  opened(generation: number): ShardPoint {
    this.#check(generation)
    return this.#point
  }

  /**
   * A trainer sends the gradients of a step and its end, perhaps again; answers with the digest of the shard after it.
   */
  async train(generation: number, step: number, variant: number): Promise<string> {
    this.#check(generation)
    if (step === this.step && variant === this.#point.variant) return this.#voted()
    const { parameters, index, journal, votesEarly } = this.#parts
    const previous = this.digest
    const point = { step, previous, variant, digest: digestAfter(parameters, { previous, step, variant }) }
    if (this.#writing?.point.digest === point.digest) return this.#writing.done
    if (step !== this.step + 1 || this.#writing)
      throw new ServiceError('STEP_CONFLICT', `shard ${index} is at step ${this.step}, not before this step ${step}`)
    if (!journal) return this.#finish(point)
    if (votesEarly) this.#sendVote(point)
    const done = this.#write(point)
    this.#writing = { point, done }
    return done.finally(() => {
      this.#writing = undefined
    })
  }

  #check(generation: number): void {
    if (generation !== this.generation) throw stale(generation, this.generation)
  }

  /** Throws where the journal cannot have the step, and where other state has come into its place meanwhile. */
  async #write(point: KeptPoint): Promise<string> {
    const { store, actor, index } = this.#parts
    const before = this.#point
    await store.keepStep(actor, index, point)
    /* c8 ignore next -- few schedules have a head take a shard back while its journal is being written */
    if (before !== this.#point) throw new ServiceError('STEP_CONFLICT', `shard ${index} has gone back meanwhile`)
    return this.#finish(point)
  }

  #finish(point: KeptPoint): string {
    this.#point = point
    if (point.step % CHECKPOINT_STEPS === 0) void this.#keepCheckpoint(point)
    return this.#voted()
  }

  async #keepCheckpoint(point: KeptPoint): Promise<void> {
    const { store, actor, index } = this.#parts
    // It is taken again after some steps where the store does not have it.
    await store.keepCheckpoint(actor, index, point).catch(() => undefined)
  }

  /** Votes for the last finished step, perhaps again. */
  #voted(): string {
    const { step, digest, generation } = this
    this.#parts.monitor.finished(generation, this.#parts.index, { step, digest })
    this.#sendVote(this.#point)
    return digest
  }

  #sendVote({ step, previous, variant }: KeptPoint): void {
    const { parameters, index, journal } = this.#parts
    const records = parameters.map((parameter) => recordOf(parameter, step, variant))
    const receipt = receiptOf(step, { digest: previous, records, durable: journal })
    this.#parts.vote({ generation: this.generation, shard: index, step, records, receipt })
  }
}

function newest(points: readonly KeptPoint[]): KeptPoint {
  return [...points].sort((one, other) => other.step - one.step)[0]!
}

function stale(given: number, generation: number): ServiceError {
  return new ServiceError('STALE_GENERATION', `generation ${given} is not ${generation}`)
}
