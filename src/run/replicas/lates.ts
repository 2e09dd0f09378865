import { ServiceError } from '../../errors.js'
import type { Receipt } from '../history.js'
import type { Member } from '../members/member.js'
import type { Update } from '../place.js'
import type { Host } from '../step/host.js'
import type { Step } from '../step/step.js'
import type { Updates } from '../step/updates.js'

/** What a member has missed of a step that was closed without its replica. Whoever has it releases the updates. */
export type Missed = { step: Step; receipt: Receipt; updates: readonly { index: number; update: Update }[] }

type Late = {
  step: Step
  missed: Promise<Missed | undefined>
  resolve: (missed: Missed | undefined) => void
  isThere: boolean
}

/**
 * The members that came too late for a step and were told so. What they send of the step is dropped; to its `end` they
 * are sent the updates and the receipt, with which they are where the others are.
 */
export class Lates {
  readonly #host: Host
  readonly #updates: Updates
  readonly #told = new Map<Member, Late>()

  constructor(host: Host, updates: Updates) {
    this.#host = host
    this.#updates = updates
  }

  /** Whether a member was told that a step was closed without its replica. */
  isTold(member: Member, number: number): boolean {
    return this.#told.get(member)?.step.number === number
  }

  /**
   * Tells a member that a step is closed without its replica: the error to tell it. Where the updates of the step are
   * not there any more the error says that alone, and nothing will follow.
   */
  tell(member: Member, step: Step): ServiceError {
    const { number } = step
    const conflict = (message: string, left_out?: true) => {
      const fields = { step: number, expected_step: number + 1, ...(left_out && { left_out }) }
      return new ServiceError('STEP_CONFLICT', message, fields)
    }
    const who = `step ${number} was closed without replica ${member.replica}`
    const receipt = this.#host.last()
    const missed = receipt?.step === number ? this.#collect(step, receipt) : undefined
    if (step !== this.#host.steps.current && !missed)
      return conflict(`${who}, and its updates are not there any more: take weights from another replica`)
    this.leave(member)
    this.#told.set(member, lateOf(step, missed))
    return conflict(`${who}: its updates and receipt come with its end`, true)
  }

  /** What a member that was told so has missed, once the step is finished; undefined where it is lost before. */
  async missed(member: Member): Promise<Missed | undefined> {
    const late = this.#told.get(member)
    const missed = await late?.missed
    /* c8 ignore next -- it may be lost in the very turn in which the step is finished */
    if (this.#told.get(member) !== late) return undefined
    this.#told.delete(member)
    return missed
  }

  /** A step is finished. */
  finish(step: Step, receipt: Receipt): void {
    for (const late of this.#told.values()) {
      /* c8 ignore next -- one that was told of an older step, and has not ended it yet */
      if (late.step !== step || late.isThere) continue
      late.isThere = true
      late.resolve(this.#collect(step, receipt))
    }
  }

  /** A member is lost, or goes on without what it has missed. */
  leave(member: Member): void {
    const late = this.#told.get(member)
    if (!late) return
    this.#told.delete(member)
    late.resolve(undefined)
    void late.missed.then((missed) => missed && releaseMissed(missed))
  }

  /** The run ends. */
  close(): void {
    /* c8 ignore next -- a run that is deleted before such a member has ended the step */
    for (const member of [...this.#told.keys()]) this.leave(member)
  }

  /** The updates of a step, if all of them are kept. */
  #collect(step: Step, receipt: Receipt): Missed | undefined {
    const kept = step.applied.map((index) => ({ index, update: this.#updates.of(index, step.number) }))
    const updates = kept.flatMap(({ index, update }) => (update ? [{ index, update }] : []))
    if (updates.length < kept.length) return undefined
    for (const { update } of updates) update.memory.retain()
    return { step, receipt, updates }
  }
}

/** Gives the memory of updates back that a member has missed. */
export function releaseMissed({ updates }: Missed): void {
  for (const { update } of updates) update.memory.release()
}

function lateOf(step: Step, there: Missed | undefined): Late {
  /* c8 ignore next -- the promise replaces it at once */
  let resolve: Late['resolve'] = () => undefined
  const missed = new Promise<Missed | undefined>((settle) => {
    resolve = settle
  })
  if (there) resolve(there)
  return { step, missed, resolve, isThere: there !== undefined }
}
