import type { Device } from '../../device/device.js'
import { ServiceError } from '../../errors.js'
import type { Member } from '../members/member.js'
import type { Members } from '../members/members.js'
import type { Buffers } from '../step/buffers.js'
import type { Ending } from '../step/ending.js'
import type { Gathering } from '../step/gathering.js'
import type { Host } from '../step/host.js'
import type { Step } from '../step/step.js'
import type { Updates } from '../step/updates.js'
import { Averaging } from './averaging.js'
import { Closing } from './closing.js'
import { Lates, type Missed } from './lates.js'

export type ReplicasMeans = {
  host: Host
  device: Device
  members: Members
  ending: Ending
  buffers: Buffers
  updates: Updates
  gatherings: readonly Gathering[]
  /** Takes back the `end`s of a replica for which something lacks now. */
  recheck: (replica: number) => void
}

/** Several replicas of a run, each of which sends whole gradients: the run computes with their means. */
export class Replicas {
  readonly averaging: Averaging
  readonly closing: Closing
  readonly lates: Lates
  readonly #means: ReplicasMeans

  constructor(means: ReplicasMeans) {
    const { recheck } = means
    this.#means = means
    this.lates = new Lates(means.host, means.updates)
    const checked = (replica: number) => {
      recheck(replica)
      this.closing.consider()
    }
    this.averaging = new Averaging({ ...means, checked })
    this.closing = new Closing({ ...means, averaging: this.averaging, lates: this.lates })
  }

  /**
   * Throws HYPERPARAMETER_INVALID for a weight that none can have, and STEP_CONFLICT for one that is not that of the
   * other ranks, and where the replica sends what another one skips.
   */
  checkEnd(member: Member, step: Step, { weight }: { weight: number }): void {
    if (!(weight > 0 && weight <= MOST_WEIGHT)) {
      const message = `weight of ${member.name} is ${weight}, expected a number above 0 and at most ${MOST_WEIGHT}`
      throw new ServiceError('HYPERPARAMETER_INVALID', message, { step: step.number })
    }
    const [other] = this.#means.ending.of(member.replica)
    const before = other?.weight ?? (step.applied.length > 0 ? step.weightOf(member.replica) : undefined)
    if (before !== undefined && before !== weight) {
      const who = other ? `rank ${other.member.rank}` : 'it'
      throw conflict(
        step,
        `${member.name} ends step ${step.number} with weight ${weight}, and ${who} has with ${before}`,
      )
    }
    this.#checkAlike(member, step)
  }

  /** What a member that was left out of a step is told, and what it has missed of it, once it is finished. */
  catchUp(member: Member, number: number): { notice?: ServiceError; missed: Promise<Missed | undefined> } {
    const { lates } = this
    if (lates.isTold(member, number)) return { missed: lates.missed(member) }
    const notice = lates.tell(member, this.#means.host.steps.of(number, `end for step ${number}`))
    /* c8 ignore next -- what it has missed may be gone, and the notice says so */
    return { notice, missed: lates.isTold(member, number) ? lates.missed(member) : Promise.resolve(undefined) }
  }

  async idle(): Promise<void> {
    await this.averaging.idle()
    await this.closing.idle()
  }

  close(): void {
    this.closing.stop()
    this.lates.close()
  }

  /** The replica whose last rank ends a step has to have sent what the others have. */
  #checkAlike({ replica }: Member, step: Step): void {
    const { ending, gatherings, host, members } = this.#means
    const { world_size, replicas } = members.layout
    if (ending.of(replica).length < world_size - 1) return
    for (let other = 0; other < replicas; other++) {
      if (other === replica || ending.of(other).length < world_size) continue
      const [own, theirs] = [gatherings[replica], gatherings[other]].map((one) => new Set(one.wholes(step)))
      const index = [...own, ...theirs].find((one) => own.has(one) !== theirs.has(one) && !step.hasApplied(one))
      if (index === undefined) return
      const [sends, skips] = own.has(index) ? [replica, other] : [other, replica]
      const { name } = host.parameters[index]
      const what = `parameter '${name}' is sent by replica ${sends} and skipped by replica ${skips} in step ${step.number}`
      throw conflict(step, `${what}: all have to do the same`, index)
    }
  }
}

/** The sum of as many weights as a run may have replicas is finite, too. */
const MOST_WEIGHT = 1e300

function conflict(step: Step, message: string, parameter?: number): ServiceError {
  const { number, expected: expected_step } = step
  const fields = { step: number, expected_step, ...(parameter !== undefined && { parameter }) }
  return new ServiceError('STEP_CONFLICT', message, fields)
}
