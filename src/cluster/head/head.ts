import { ServiceError } from '../../errors.js'
import type { Attention } from '../../optimizer/attention.js'
import { allStateBytes, type Parameter } from '../../optimizer/parameter.js'
import type { ReceiptFrame } from '../../wire/frame.js'
import type { AssignedShard, Assignment } from '../assignment.js'
import type { CommitLog } from '../commit-log.js'
import { declaredHash, rangesOf, shardName, streamOf } from '../names.js'
import type { Calls, WholeBody } from '../peers/calls.js'
import type { Vote } from '../vote.js'
import { Whole } from '../whole.js'
import type { WholeCheckpoint, WholeRecord } from './whole-store.js'

/** A control connection of a whole, which is told that the assignment is another one. */
export type ControlConnection = { superseded(error: ServiceError): void }

/** What a control connection is told of a whole: a frame `placed` but for what is the service's. */
export type Placement = {
  readonly run: string
  readonly generation: number
  readonly step: number
  readonly digest: string
  readonly shards: { run: string; url: string; parameters: number[][]; checkpoint?: string }[]
}

export type HeadParts = {
  record: WholeRecord
  parameters: readonly Parameter[]
  attentions: readonly Attention[]
  log: CommitLog
  checkpoints: readonly WholeCheckpoint[]
  self: string
  calls: Calls
  /** Keeps what is known of checkpoints, and answers what is kept then; undefined where the service keeps none. */
  keep: ((checkpoints: readonly WholeCheckpoint[]) => Promise<readonly WholeCheckpoint[]>) | undefined
}

/** So many checkpoints without a tag are known; those of shards are pruned by their processes. */
const MOST_UNTAGGED = 1000

/** A whole of which this process is the head: its assignment, its steps and its control connections. */
export class Head {
  readonly #parts: HeadParts
  #whole: Whole
  #checkpoints: readonly WholeCheckpoint[]
  /** The one that the whole has gone back to last. */
  #back: WholeCheckpoint | undefined
  readonly #controls = new Set<ControlConnection>()
  readonly #declared: readonly string[]
  readonly #bytes: readonly number[]
  #isTakingCheckpoint = false

  /** Becomes head, with a generation above those of all heads before. */
  static async begin(parts: HeadParts): Promise<Head> {
    const newest = await parts.log.newest()
    return new Head(parts, await beginWhole(parts, newest?.generation))
  }

  private constructor(parts: HeadParts, whole: Whole) {
    this.#parts = parts
    this.#whole = whole
    this.#checkpoints = parts.checkpoints
    const shards = parts.record.shards.map((shard) => shard.parameters.map((index) => parts.parameters[index]))
    this.#declared = shards.map(declaredHash)
    this.#bytes = shards.map(allStateBytes)
  }

  get run(): string {
    return this.#parts.record.run
  }

  get parameters(): readonly Parameter[] {
    return this.#parts.parameters
  }

  get attentions(): readonly Attention[] {
    return this.#parts.attentions
  }

  get record(): WholeRecord {
    return this.#parts.record
  }

  get step(): number {
    return this.#whole.step
  }

  get digest(): string {
    return this.#whole.digest
  }

  get generation(): number {
    return this.#whole.generation
  }

  /**
   * Where the shards are, and with a checkpoint of the whole what each of them is opened at. Throws why it is over:
   * while a whole is being deleted nobody opens a shard of it, which would be left behind.
   */
  placement(checkpoint?: WholeCheckpoint): Placement {
    this.#checkOpen()
    const { run, generation, step, digest } = this
    const shards = this.#shards.map(({ peer, parameters }, index) => ({
      ...{ run: shardName(run, index), url: streamOf(peer), parameters: rangesOf(parameters) },
      ...(checkpoint && { checkpoint: checkpoint.shards[index] }),
    }))
    return { run, generation, step, digest, shards }
  }

  /** As REST tells of it, and the processes of its shards ask. Throws as `placement`. */
  body(): WholeBody {
    this.#checkOpen()
    const { run, generation, step, digest } = this
    // Until the next step is committed: a shard that was opened at it later would lose steps.
    const back = this.#back?.step === step ? this.#back : undefined
    const shards = this.#shards.map(({ peer, parameters }, index) => ({
      ...{ run: shardName(run, index), peer, parameters: rangesOf(parameters), declared: this.#declared[index] },
      ...{ state_bytes: this.#bytes[index], digest: this.#whole.standing.shards[index] },
      ...(back && { checkpoint: back.shards[index] }),
      voted: this.#whole.hasVoted(index),
    }))
    return { run, head: this.#parts.self, generation, step, digest, created_at: this.record.created_at, shards }
  }

  /** Throws as `Whole.vote`. */
  vote(vote: Vote): void {
    this.#whole.vote(vote)
  }

  /** As `Whole.ended`. */
  ended(step: number): Promise<ReceiptFrame> {
    return this.#whole.ended(step)
  }

  /** Tells a connection of a newer assignment, until the function is called that this returns. */
  join(control: ControlConnection): () => void {
    this.#controls.add(control)
    return () => void this.#controls.delete(control)
  }

  /**
   * Has every shard take a checkpoint of the last committed step. Throws FRAME_UNEXPECTED where the next one has begun
   * to end or another checkpoint is under way, PARAMETER_INVALID where nothing is kept, and what the processes refuse.
   */
  async checkpoint(tag: string | undefined): Promise<WholeCheckpoint & { bytes: number }> {
    const { keep, calls } = this.#parts
    if (!keep)
      throw new ServiceError(
        'PARAMETER_INVALID',
        'this service keeps no checkpoints: it was started without a data folder',
      )
    const { step, digest, shards } = this.#whole.standing
    const isBegun = this.#shards.some((_, index) => this.#whole.hasVoted(index))
    if (isBegun || this.#isTakingCheckpoint)
      throw new ServiceError(
        'FRAME_UNEXPECTED',
        `a frame 'checkpoint' in step ${step + 1} of run '${this.run}', or beside another one`,
      )
    this.#isTakingCheckpoint = true
    try {
      const taken = await Promise.all(
        this.#shards.map(({ peer }, index) => calls.checkpoint(peer, shardName(this.run, index), tag)),
      )
      const other = taken.findIndex((one, index) => one.step !== step || one.digest !== shards[index])
      /* c8 ignore next 4 -- a client that begins a step before 'checkpointed' may be too late for that */
      if (other >= 0) {
        const message = `checkpoint of step ${step}: shard ${other} has taken its own of step ${taken[other].step}. Begin no step before 'checkpointed'`
        throw new ServiceError('STEP_CONFLICT', message, { step })
      }
      const id = `${step}-${this.generation}-${this.#checkpoints.length}`
      const names = taken.map(({ checkpoint }) => checkpoint)
      const made = { checkpoint: id, ...(tag !== undefined && { tag }), step, digest, shards: names }
      this.#checkpoints = await keep(newest([...this.#checkpoints, made]))
      return { ...made, bytes: taken.reduce((sum, { bytes }) => sum + bytes, 0) }
    } finally {
      this.#isTakingCheckpoint = false
    }
  }

  /**
   * Puts the whole where a checkpoint is, with another generation. Throws NOT_FOUND for one that it does not have or
   * that a shard has no more, and what a process refuses to say of it: then nothing has changed.
   */
  async goBack(name: string): Promise<WholeCheckpoint> {
    const found = this.#checkpoints.findLast(({ checkpoint, tag }) => checkpoint === name || tag === name)
    if (!found) throw new ServiceError('NOT_FOUND', `run '${this.run}' has no checkpoint '${name}' of all its shards`)
    const entry = await this.#whole.find(found.step)
    if (entry?.digest !== found.digest) {
      const message = `checkpoint '${name}' is of a history that run '${this.run}' has left: after step ${found.step} it has another digest now`
      throw new ServiceError('NOT_FOUND', message)
    }
    await this.#checkKept(name, found)
    const before = this.#whole
    // From here on this is the whole, wherever it is: the log takes no more entries of the one before.
    this.#whole = await beginWhole(this.#parts, before.generation)
    const newer = superseded(this.run, before.generation, this.generation)
    before.close(newer)
    this.#tell(newer)
    await this.#whole.goTo(found.step)
    this.#back = found
    return found
  }

  /** A whole that has gone back to what a shard cannot go back to could go on from nowhere. */
  async #checkKept(name: string, { shards }: WholeCheckpoint): Promise<void> {
    const { calls } = this.#parts
    await Promise.all(
      this.#shards.map(async ({ peer }, index) => {
        const shard = shardName(this.run, index)
        if (await calls.hasCheckpoint(peer, shard, shards[index])) return
        const message = `checkpoint '${name}' of run '${this.run}' is not whole any more: ${peer} has no '${shards[index]}' of shard '${shard}'`
        const remedy = 'a checkpoint with a tag outlives --checkpoints-kept'
        throw new ServiceError('NOT_FOUND', `${message}. Go back to another one; ${remedy}`)
      }),
    )
  }

  /** Ends it for everybody. */
  close(error: ServiceError): void {
    this.#whole.close(error)
    this.#tell(error)
  }

  get #shards(): readonly AssignedShard[] {
    return this.#whole.assignment.shards
  }

  #checkOpen(): void {
    if (this.#whole.over) throw this.#whole.over
  }

  #tell(error: ServiceError): void {
    for (const control of [...this.#controls]) control.superseded(error)
    this.#controls.clear()
  }
}

function superseded(run: string, old: number, now: number): ServiceError {
  const message = `run '${run}' was opened with generation ${old}, its assignment has generation ${now}: open it again`
  return new ServiceError('STALE_GENERATION', message, { close: 4409 })
}

/**
 * The clock keeps the generations of a whole apart from those of one of the same name that was deleted or forgotten;
 * that they grow does not depend on it.
 */
function beginWhole({ record, log, attentions, self }: HeadParts, before = 0): Promise<Whole> {
  const generation = Math.max(Date.now(), before + 1)
  const assignment: Assignment = { run: record.run, generation, shards: record.shards }
  const names = attentions.map(({ name }) => name)
  return Whole.begin({ log, assignment, attentions: names, head: `${self} ${generation}` })
}

function newest(checkpoints: readonly WholeCheckpoint[]): readonly WholeCheckpoint[] {
  let surplus = checkpoints.filter(({ tag }) => tag === undefined).length - MOST_UNTAGGED
  return checkpoints.filter(({ tag }) => tag !== undefined || surplus-- <= 0)
}
