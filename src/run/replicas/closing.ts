import { ServiceError } from '../../errors.js'
import type { Contribution } from '../../wire/frame.js'
import type { Members } from '../members/members.js'
import type { Ending } from '../step/ending.js'
import type { Gathering } from '../step/gathering.js'
import type { Host } from '../step/host.js'
import type { Step } from '../step/step.js'
import type { Averaging } from './averaging.js'
import type { Lates } from './lates.js'

export type ClosingMeans = {
  host: Host
  members: Members
  ending: Ending
  averaging: Averaging
  lates: Lates
  gatherings: readonly Gathering[]
  /** Takes back the `end`s of a replica for which something lacks now. */
  recheck: (replica: number) => void
}

/**
 * Decides with which replicas a step is closed, and when: with all of them, or with a quorum. It is closed once all
 * that are connected have ended it and they are enough, or at the deadline with those that have.
 */
export class Closing {
  readonly #means: ClosingMeans
  #deadline: NodeJS.Timeout | undefined
  #isLate = false
  #work: Promise<void> | undefined

  constructor(means: ClosingMeans) {
    this.#means = means
  }

  /** An `end` has come, or was lost, or a member was. */
  consider(): void {
    const { host, ending } = this.#means
    /* c8 ignore next -- an end may come, or a member be lost, while a step is being closed */
    if (this.#work) return
    if (ending.size === 0) return this.stop()
    this.#startDeadline()
    const { current: step } = host.steps
    const came = this.#came(step)
    if (came && this.#isTime(step, came.length)) this.#close(step, came)
    else if (came && this.#isLate) this.#lose(step, came.length)
  }

  /** When no step is being closed. */
  async idle(): Promise<void> {
    /* c8 ignore next -- a member may open the run while a step is being closed */
    while (this.#work) await this.#work
  }

  /** Nobody waits for a deadline any more. */
  stop(): void {
    clearTimeout(this.#deadline)
    this.#deadline = undefined
    this.#isLate = false
  }

  /** The replicas whose every rank has ended the step; undefined while gradients of one of them are being looked at. */
  #came(step: Step): number[] | undefined {
    const { ending, averaging, members } = this.#means
    const { replicas, world_size } = members.layout
    const all = Array.from({ length: replicas }, (_, replica) => replica)
    const came = all.filter((replica) => !step.isLeftOut(replica) && ending.of(replica).length === world_size)
    return came.every((replica) => averaging.isChecked(replica)) ? came : undefined
  }

  #isTime(step: Step, came: number): boolean {
    const { quorum, replicas } = this.#means.members.layout
    if (!quorum) return came === replicas
    const connected = this.#connected(step)
    return came >= quorum.min_replicas && 2 * came > connected && (came === connected || this.#isLate)
  }

  /** How many replicas are connected that may still be part of the step. */
  #connected(step: Step): number {
    return this.#means.members.connectedReplicas.filter((replica) => !step.isLeftOut(replica)).length
  }

  #startDeadline(): void {
    const { quorum } = this.#means.members.layout
    if (!quorum || this.#deadline) return
    const late = () => {
      this.#isLate = true
      this.consider()
    }
    this.#deadline = setTimeout(late, quorum.deadline_seconds * 1000).unref()
  }

  #close(step: Step, came: readonly number[]): void {
    const { members, ending } = this.#means
    this.stop()
    for (let replica = 0; replica < members.layout.replicas; replica++)
      if (!came.includes(replica)) this.#leaveOut(step, replica)
    const contributions = came.map((replica) => ({ replica, weight: ending.of(replica)[0].weight }))
    step.close(contributions)
    this.#work = this.#finish(step, contributions).finally(() => {
      this.#work = undefined
      this.consider()
    })
  }

  #leaveOut(step: Step, replica: number): void {
    const { ending, gatherings, host, members } = this.#means
    /* c8 ignore next -- a step that is closed a second time, after some of it was refused */
    if (step.isLeftOut(replica)) return
    step.leaveOut(replica)
    gatherings[replica].drop()
    ending.settle(
      'left_out',
      ending.of(replica).map(({ member }) => member),
    )
    if (members.connected.some((member) => member.replica === replica)) host.leftOut(1)
  }

  /** Computes what the step was closed with, and finishes it; what could not be applied has to be sent again. */
  async #finish(step: Step, contributions: readonly Contribution[]): Promise<void> {
    const { host, averaging, ending, lates, recheck } = this.#means
    // Before anything is awaited: who is lost from now on has contributed.
    const isWhole = await averaging.compute(step, contributions)
    await host.held()
    if (!isWhole) {
      for (const replica of step.contributors.keys()) recheck(replica)
      step.reopen()
      return
    }
    const { waited } = ending
    const concluded = Promise.resolve().then(() => host.conclude(step, waited))
    ending.settle(concluded)
    const [done] = await Promise.allSettled([concluded])
    if (done.status === 'fulfilled') lates.finish(step, done.value)
  }

  #lose({ number: step }: Step, came: number): void {
    const { host, ending, members, gatherings } = this.#means
    const { quorum } = members.layout
    const waiting = ending.ids
    this.stop()
    host.quorumLost()
    for (const member of members.connected) if (waiting.includes(member.id)) gatherings[member.replica].unskip(member)
    const connected = this.#connected(host.steps.current)
    const needs = `of ${connected} that are connected more than half have to, and ${quorum?.min_replicas} at least`
    const message = `${came} replicas have ended step ${step} within ${quorum?.deadline_seconds} seconds: ${needs}; nothing was applied, send end again`
    ending.settle(Promise.reject(new ServiceError('QUORUM_LOST', message, { step })))
  }
}
