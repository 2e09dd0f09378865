import assert from 'node:assert'
import { ServiceError } from '../errors.js'
import { FIRST_DIGEST } from '../run/digest.js'
import type { ReceiptFrame } from '../wire/frame.js'
import type { Assignment } from './assignment.js'
import { type CommitLog, type Entry, findStep, isSameEntry, type Standing } from './commit-log.js'
import { checkAgreement, checkVote, type Parts, tally, type Vote } from './vote.js'

/**
 * `head` is another text for each time that a process becomes head. `start`: where the whole begins if its log is
 * empty, by default at step 0.
 */
export type WholeOptions = {
  readonly log: CommitLog
  readonly assignment: Assignment
  readonly attentions: readonly string[]
  readonly head: string
  readonly start?: Standing
}

/** Somebody who has sent the `end` of the next step. */
type Waiting = { resolve(receipt: ReceiptFrame): void; reject(error: unknown): void }

/**
 * A whole at its head, for one generation: it takes the votes of the shards and commits each step that all have voted
 * for. It has no tensors, and does nothing by itself but write to its log. Another assignment is another generation,
 * and so another `Whole.begin`; the one before finds out when it commits next, and is over.
 */
export class Whole {
  readonly assignment: Assignment
  readonly #log: CommitLog
  readonly #parts: Parts
  readonly #votes = new Map<number, Vote>()
  readonly #waiting: Waiting[] = []
  #newest: Entry
  #committing = false
  #over: ServiceError | undefined

  private constructor({ log, assignment, attentions }: WholeOptions, newest: Entry) {
    this.assignment = assignment
    this.#log = log
    this.#parts = { parameters: assignment.shards.map(({ parameters }) => parameters), attentions }
    this.#newest = newest
  }

  /**
   * Becomes head: closes the log to heads of older generations, and goes on after the last step that one of them has
   * committed. Throws STALE_GENERATION where the log is closed to this generation, and whatever the log throws; to call
   * it again with the same options does no harm.
   */
  static async begin(options: WholeOptions): Promise<Whole> {
    const { log, assignment, head } = options
    let newest = await log.newest()
    for (;;) {
      if (newest?.head === head) return new Whole(options, newest)
      if (newest && newest.generation >= assignment.generation) throw stale(assignment, newest.generation)
      const standing = newest ?? options.start ?? startOf(assignment)
      checkShards(standing, assignment)
      newest = await log.put(entryAfter(newest, 'begin', { standing, generation: assignment.generation, head }))
    }
  }

  /** Of the last committed step. */
  get standing(): Standing {
    return this.#newest
  }

  get step(): number {
    return this.#newest.step
  }

  get digest(): string {
    return this.#newest.digest
  }

  get generation(): number {
    return this.assignment.generation
  }

  /** Why this head commits no more; undefined while it does. */
  get over(): ServiceError | undefined {
    return this.#over
  }

  /** Whether a shard has voted for the step after the last committed one. */
  hasVoted(shard: number): boolean {
    return this.#votes.has(shard)
  }

  /** The entry of an earlier step, undefined where the log has none. */
  find(step: number): Promise<Entry | undefined> {
    return findStep(this.#log, this.#newest, step)
  }

  /**
   * Goes back to an earlier step before any shard has voted, which is to say right after `begin`: those who wait for
   * the receipt of another step are told STEP_CONFLICT. Throws NOT_FOUND for a step that the log does not have.
   */
  async goTo(step: number): Promise<void> {
    if (this.#over) throw this.#over
    assert(this.#votes.size === 0, 'a whole goes back before its shards are opened')
    const found = await this.find(step)
    if (!found) throw new ServiceError('NOT_FOUND', `${this.#name} was never at step ${step}`, { step })
    await this.#put('begin', found)
    this.#refuse(this.#conflict(`the step has not ended: ${this.#name} has gone back to step ${step}`))
  }

  /**
   * Takes a vote. One that was taken before changes nothing. Throws STALE_GENERATION for one of another generation, and
   * STEP_CONFLICT for one of another step, one that differs from what the shard has voted before, and one of a shard
   * that is elsewhere than the whole.
   */
  vote(vote: Vote): void {
    const { generation, shard, step, receipt } = vote
    if (this.#over) throw this.#over
    if (generation !== this.generation) throw staleVote(vote, this.assignment)
    const before = step === this.step ? this.#newest.shards[shard] : this.#votes.get(shard)?.receipt.digest
    if (before !== undefined && before !== receipt.digest)
      throw this.#conflict(`shard ${shard} has voted ${before} for step ${step}, and now votes ${receipt.digest}`)
    if (before !== undefined) return
    if (step !== this.step + 1) throw this.#conflict(`shard ${shard} votes for step ${step}`)
    checkVote(vote, this.#newest, this.#parts)
    this.#checkAgreement(vote)
    this.#votes.set(shard, vote)
    this.#consider()
  }

  /**
   * The receipt of a step, once all shards have voted for it and the log has it; that of the last committed step again.
   * Throws STEP_CONFLICT for another step. It is rejected with STALE_GENERATION where another head has taken over, and
   * with what the log throws: the step is not known to be committed then, and `ended` may be asked again.
   */
  async ended(step: number): Promise<ReceiptFrame> {
    if (this.#over) throw this.#over
    const { receipt } = this.#newest
    if (step === this.step && receipt) return { ...receipt, replayed: true }
    if (step !== this.step + 1) throw this.#conflict(`end for step ${step}`)
    const waiting = new Promise<ReceiptFrame>((resolve, reject) => this.#waiting.push({ resolve, reject }))
    this.#consider()
    return waiting
  }

  /**
   * Throws STALE_GENERATION where another head has taken over, which this one may not have noticed: it was stopped for
   * a while, or cut off. Safety does not need it, since such a head commits nothing; but it would send clients to
   * shards that refuse them, so it is asked before a client is told where the shards are.
   */
  async confirm(): Promise<void> {
    const newest = await this.#log.newest()
    if (newest && newest.generation > this.generation) this.close(stale(this.assignment, newest.generation))
    if (this.#over) throw this.#over
  }

  /** Commits nothing more, and tells those who wait why. A commit that is being written may still come to the log. */
  close(reason: ServiceError): void {
    this.#over ??= reason
    this.#refuse(this.#over)
  }

  get #name(): string {
    return `run '${this.assignment.run}'`
  }

  /** Commits the next step if all shards have voted for it. */
  #consider(): void {
    if (this.#committing || this.#over || this.#votes.size < this.#parts.parameters.length) return
    this.#committing = true
    void this.#commit().then(
      () => {
        this.#committing = false
      },
      (error) => {
        this.#committing = false
        this.#refuse(error)
      },
    )
  }

  async #commit(): Promise<void> {
    const votes = this.#parts.parameters.map((_, shard) => this.#votes.get(shard)).filter((vote) => vote !== undefined)
    await this.#put('commit', tally(votes, this.#newest, { ...this.#parts, isDurable: this.#log.isDurable }))
    this.#votes.clear()
    for (const { resolve } of this.#waiting.splice(0)) resolve(this.#newest.receipt as ReceiptFrame)
  }

  /** Writes the next entry. Throws STALE_GENERATION where another head has taken its position. */
  async #put(kind: Entry['kind'], standing: Standing): Promise<void> {
    const { head } = this.#newest
    const entry = entryAfter(this.#newest, kind, { standing, generation: this.generation, head })
    const stands = await this.#log.put(entry)
    if (!isSameEntry(stands, entry)) throw this.#fail(stale(this.assignment, stands.generation))
    this.#newest = stands
  }

  /** Every vote has to be of the same step, hyperparameters and all: those who wait for it are told as well. */
  #checkAgreement(vote: Vote): void {
    try {
      for (const other of this.#votes.values()) checkAgreement(vote, other)
    } catch (error) {
      this.#refuse(error)
      throw error
    }
  }

  #fail(reason: ServiceError): ServiceError {
    this.close(reason)
    return reason
  }

  #refuse(error: unknown): void {
    for (const { reject } of this.#waiting.splice(0)) reject(error)
  }

  #conflict(what: string): ServiceError {
    const expected_step = this.step + 1
    return new ServiceError('STEP_CONFLICT', `${what}, ${this.#name} is at step ${this.step}`, { expected_step })
  }
}

function startOf({ shards }: Assignment): Standing {
  return { step: 0, digest: FIRST_DIGEST, shards: shards.map(() => FIRST_DIGEST) }
}

type Written = { readonly standing: Standing; readonly generation: number; readonly head: string }

function entryAfter(
  before: Entry | undefined,
  kind: Entry['kind'],
  { standing: { step, digest, shards, receipt }, generation, head }: Written,
): Entry {
  const position = (before?.position ?? 0) + 1
  return { position, kind, generation, head, step, digest, shards, ...(receipt && { receipt }) }
}

function checkShards({ shards }: Standing, { run, shards: { length } }: Assignment): void {
  if (shards.length === length) return
  const message = `run '${run}' has ${shards.length} shards in its log, ${length} are assigned: their number cannot change`
  throw new ServiceError('RUN_MISMATCH', message)
}

function stale({ run, generation }: Assignment, newer: number): ServiceError {
  const message = `run '${run}' is of generation ${newer} by now, this head has generation ${generation}`
  return new ServiceError('STALE_GENERATION', `${message}: open the run again to learn where its shards are`)
}

function staleVote({ shard, generation }: Vote, { run, generation: current }: Assignment): ServiceError {
  const message = `shard ${shard} votes with generation ${generation}, run '${run}' has generation ${current} here`
  return new ServiceError('STALE_GENERATION', `${message}: the shard has to be opened again`)
}
