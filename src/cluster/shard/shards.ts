import { ServiceError } from '../../errors.js'
import type { Log } from '../../keep/keeper.js'
import type { Member } from '../../run/members/member.js'
import type { Run } from '../../run/run.js'
import type { OpenFrame } from '../../wire/frame.js'
import type { Wholes } from '../head/wholes.js'
import { declaredHash, parseShardName, type ShardName } from '../names.js'
import type { Calls, WholeBody } from '../peers/calls.js'
import type { Peers } from '../peers/peers.js'
import type { Vote } from '../vote.js'
import { Voter } from './voter.js'

export type ShardsMeans = {
  peers: Peers
  calls: Calls
  /** Those of which this process is the head: it does not ask itself over HTTP. */
  wholes: Wholes
  log: Log
  /** Whether there is a run of this name here, in memory or on the disk. */
  hasRun: (name: string) => boolean
}

/** What the head says of a shard that is about to be opened here, which holds the run against that. */
export type Pass = {
  /** Throws where the run is not where the whole is. The member is then to be detached. */
  admit(run: Run, member: Member): void
}

type Known = { generation: number; readonly voter: Voter; latest: Vote | undefined }

/** The shards that this process has of wholes, and the votes that it sends to their heads. */
export class Shards {
  readonly #means: ShardsMeans
  readonly #known = new Map<Run, Known>()

  constructor(means: ShardsMeans) {
    this.#means = means
  }

  /**
   * Asks the head whether a shard may be opened here. Throws STALE_GENERATION where it is another process's, or the
   * frame has another generation than the newest, RUN_NOT_FOUND where there is no such whole, or the shard has lost
   * the steps of it, and PEER_FAILED where the head does not answer.
   */
  async enter(frame: OpenFrame): Promise<Pass> {
    const name = nameOf(frame)
    const whole = await this.#readWhole(name.whole)
    const { generation, step } = whole
    const said = frame.shard
    if (said?.generation !== generation) {
      const given = said ? `generation ${said.generation}` : 'no generation (the key `shard`)'
      throw stale(`shard '${frame.run}' was opened with ${given}, the assignment has ${generation}`)
    }
    const shard = whole.shards[name.index]
    if (shard?.peer !== this.#means.peers.self)
      throw stale(`'${frame.run}' is no shard of this process${shard ? `, but of ${shard.peer}` : ''}`)
    checkCheckpoint(frame, shard.checkpoint)
    if (step > 0 && frame.checkpoint === undefined && !this.#means.hasRun(frame.run)) {
      const message = `shard '${frame.run}' is not here any more, and the run is at step ${step}: was this process started again without durable state?`
      throw new ServiceError('RUN_NOT_FOUND', message)
    }
    return { admit: (run, member) => this.#admit(run, member, { whole, index: name.index }) }
  }

  /** No vote is sent any more. */
  close(): void {
    for (const { voter } of this.#known.values()) voter.close()
  }

  #admit(run: Run, member: Member, { whole, index }: { whole: WholeBody; index: number }): void {
    const { digest, declared } = whole.shards[index]
    if (declaredHash(run.parameters) !== declared) {
      const message = `the parameters of shard '${run.name}' are not those of the whole that 'placed' names, in their order`
      throw new ServiceError('RUN_MISMATCH', message)
    }
    const isAt = run.step === whole.step && run.digest === digest
    const isAhead = run.step === whole.step + 1 && !run.begun && run.lastStep().previous === digest
    if (!isAt && !isAhead) throw elsewhere(run, whole, digest)
    const known = this.#register(run, index, whole)
    /* c8 ignore next 4 -- another member opens the shard with a newer one while this one is asked for */
    if (known.generation > whole.generation)
      throw stale(
        `shard '${run.name}' was opened with generation ${whole.generation}, since then with ${known.generation}`,
      )
    if (known.generation < whole.generation) {
      expelOthers(run, member, stale(`the assignment of run '${whole.run}' has generation ${whole.generation} now`))
      known.generation = whole.generation
      if (known.latest) known.latest = { ...known.latest, generation: whole.generation }
    }
    // The head may be another process than the one that has taken the vote, or may have lost it.
    if (isAhead) this.#castAgain(run, index, known)
    else known.voter.close()
  }

  #register(run: Run, index: number, { run: whole, generation }: WholeBody): Known {
    const before = this.#known.get(run)
    if (before) return before
    const { log } = this.#means
    const voter = new Voter({
      send: (vote, signal) => this.#send(whole, vote, signal),
      refused: (error) => {
        log.error({ event: 'vote_refused', run: run.name, code: error.code, reason: error.message })
        expelOthers(run, undefined, new ServiceError(error.code, error.message, { close: closeOf(error) }))
      },
      failed: (error) => log.warn({ event: 'vote_waits', run: run.name, code: error.code, reason: error.message }),
    })
    const known: Known = { generation, voter, latest: undefined }
    this.#known.set(run, known)
    run.on('receipt', () => {
      known.latest = voteOf(run, index, known.generation)
      voter.cast(known.latest)
    })
    run.once('gone', () => {
      voter.close()
      this.#known.delete(run)
    })
    return known
  }

  #castAgain(run: Run, index: number, known: Known): void {
    if (known.latest?.step !== run.step) known.latest = voteOf(run, index, known.generation)
    known.voter.cast(known.latest)
  }

  async #send(whole: string, vote: Vote, signal: AbortSignal): Promise<void> {
    const { peers, calls, wholes } = this.#means
    const head = peers.headOf(whole)
    if (head === peers.self) return wholes.get(whole).vote(vote)
    await calls.vote(head, whole, vote, signal)
  }

  async #readWhole(whole: string): Promise<WholeBody> {
    const { peers, calls, wholes } = this.#means
    const head = peers.headOf(whole)
    return head === peers.self ? wholes.get(whole).body() : calls.readWhole(head, whole)
  }
}

/** The name of the shard that a frame opens. Throws STALE_GENERATION where it does not say which one it is. */
function nameOf({ run, shard }: OpenFrame): ShardName {
  const name = parseShardName(run)
  if (!name)
    throw new ServiceError('PARAMETER_INVALID', `'${run}' is no name of a shard, and open has the key \`shard\``)
  if (shard && shard.index !== name.index)
    throw new ServiceError('PARAMETER_INVALID', `shard '${run}' is opened as the shard with index ${shard.index}`)
  return name
}

/** Throws STEP_CONFLICT for a shard that would go back without its whole: it would lose steps, and be refused. */
function checkCheckpoint({ run, checkpoint }: OpenFrame, expected: string | undefined): void {
  if (checkpoint === undefined || checkpoint === expected) return
  const back = expected === undefined ? 'has not gone back' : `has gone back to '${expected}' of it`
  const message = `shard '${run}' is opened at checkpoint '${checkpoint}', and its run ${back}: open the run at a checkpoint of all shards`
  throw new ServiceError('STEP_CONFLICT', message)
}

/** The vote for the last finished step of a shard. */
function voteOf(run: Run, shard: number, generation: number): Vote {
  const { receipt, records } = run.lastStep()
  return { generation, shard, step: receipt.step, records, receipt }
}

function stale(message: string): ServiceError {
  return new ServiceError('STALE_GENERATION', `${message}: open the run again`, { close: 4409 })
}

function closeOf({ code }: ServiceError): number {
  return code === 'STALE_GENERATION' ? 4409 : 1008
}

/** Sends connections of a run away, and has the run forget them. */
function expelOthers(run: Run, member: Member | undefined, error: ServiceError): void {
  for (const other of run.intake.members.connected.filter((one) => one !== member)) {
    run.intake.detach(other)
    other.expel(error)
  }
}

function elsewhere(run: Run, { run: whole, step }: WholeBody, digest: string): ServiceError {
  const has = `shard '${run.name}' is at step ${run.step} with digest ${run.digest}`
  const message = `${has}, run '${whole}' at step ${step}, where the shard had digest ${digest}: go back to a checkpoint of the whole, or delete it`
  return new ServiceError('STEP_CONFLICT', message, { step, expected_step: step + 1 })
}
