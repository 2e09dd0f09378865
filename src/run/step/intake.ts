import type { Device } from '../../device/device.js'
import type { ServiceError } from '../../errors.js'
import type { Attention } from '../../optimizer/attention.js'
import type { Parameter } from '../../optimizer/parameter.js'
import { checkMaxLogits } from '../../optimizer/qk-clip.js'
import type { MemberStatus, StepFrame } from '../../wire/frame.js'
import type { Receipt, Waited } from '../history.js'
import type { ScaledUpdate, Shard } from '../shard.js'
import { Buffers } from './buffers.js'
import { checkComplete } from './conclusion.js'
import { Ending } from './ending.js'
import { Gathering, type Part, type Receiver, type Whole } from './gathering.js'
import type { Layout } from './layout.js'
import type { Connection, Member, Seat } from './member.js'
import { Members } from './members.js'
import type { Step, StepValues } from './step.js'
import type { Steps } from './steps.js'

/** A run, as far as what its members send has to know it. */
export type Host = {
  readonly name: string
  readonly parameters: readonly Parameter[]
  readonly attentions: readonly Attention[]
  readonly shard: Shard
  readonly steps: Steps
  /** Set while work is done between two steps: no step may end before it resolves. */
  held(): Promise<unknown> | undefined
  /** When every job has been committed or dropped. */
  settled(): Promise<void>
  /** The step that a gradient is to be applied in, or computed again. Throws STEP_CONFLICT. */
  stepOfGradient(index: number, number: number): Step
  /** Computes a gradient of which all parts have come; undefined where its ticket was cancelled. */
  compute(whole: Whole): Promise<ScaledUpdate | undefined>
  /** A member has come or gone. */
  changed(status: MemberStatus): void
  /** The receipt of the last finished step. */
  last(): Receipt | undefined
  /** Finishes the step in progress; `waited` are the seconds that its members have waited for each rank. */
  conclude(step: Step, waited: readonly Waited[]): Receipt | Promise<Receipt>
}

/** What the members of a run send: it holds each frame against the step in progress, and has all of them at its end. */
export class Intake {
  readonly members: Members
  readonly #host: Host
  readonly #device: Device
  readonly #ending = new Ending()
  #gathering: Gathering
  /** Undefined until members put gradients together. */
  #buffers: Buffers | undefined

  constructor(device: Device, host: Host) {
    this.#device = device
    this.#host = host
    this.members = new Members(host.name, host.parameters, (status) => host.changed(status))
    this.#gathering = this.#gather(this.members.layout)
  }

  /** The ranks whose `end` of the step in progress has come. */
  get ended(): readonly number[] {
    return this.#ending.ranks
  }

  /**
   * Makes the memory ready in which the members of a layout put their gradients together. Throws OVER_CAPACITY with the
   * bytes.
   */
  prepare(layout: Layout): void {
    if (!layout.named || this.members.layout.named || this.#buffers) return
    this.#buffers = new Buffers(this.#device, this.#host.parameters, this.#host.name)
  }

  /**
   * Gives a connection its seat in a layout; the only member has none. The jobs of the member before settle first: the
   * parameters that they applied show in `ahead`, and their values hold for the step; with nothing applied the values
   * are forgotten. Throws OVER_CAPACITY where the members' parts lack memory.
   */
  async attach(connection: Connection, seat?: Seat, layout: Layout = this.members.layoutFor(seat)): Promise<Member> {
    const isNew = layout !== this.members.layout
    this.prepare(layout)
    const { member, older } = this.members.take(connection, layout, seat)
    for (const other of older) {
      this.#lose(other)
      other.fence()
    }
    await this.#host.settled()
    await this.#gathering.idle()
    if (isNew) this.#relay(layout)
    else this.#host.steps.current.forget(member)
    return member
  }

  /** The member's connection is gone. Jobs that no lane has begun are dropped, unless others sent parts for them. */
  detach(member: Member): void {
    member.lose()
    if (!this.members.leave(member)) return
    this.#lose(member)
    if (this.members.layout.named) void this.#forgetLost(member)
  }

  /** Tells the connections that have the run why they have to go. */
  expel(error: ServiceError): void {
    for (const member of this.members.connected) member.expel(error)
  }

  /**
   * Takes a `step` frame: for the step in progress its values, for the last finished one only the values that it had.
   */
  announce(member: Member, frame: StepFrame): void {
    const { step: number, groups, gradient_scale, max_logits = {}, traceparent } = frame
    const step = this.#host.steps.of(number, `a step frame for step ${number}`)
    step.refuse(member)
    const values: Partial<StepValues> = {
      ...(groups && { groups }),
      ...(gradient_scale !== undefined && { gradient_scale }),
      max_logits: checkMaxLogits(this.#host.attentions, max_logits, number),
    }
    step.announce(member, values)
    if (traceparent !== undefined && member.rank === 0) step.traceparent = traceparent
    this.#gathering.begun()
  }

  /**
   * A frame of this member that announces a step could not be read: nothing is taken for that step before another one
   * comes.
   */
  refuseAnnouncement(member: Member): void {
    this.#host.steps.current.refuse(member)
  }

  /**
   * Answers the step that a member's gradient is to be applied in, or computed again. Throws STEP_CONFLICT where
   * neither can be.
   */
  expect(member: Member, index: number, number: number): Step {
    const step = this.#host.stepOfGradient(index, number)
    step.checkAccepted(member)
    this.#begin(member, step)
    return step
  }

  /** A member sends its part of a gradient again: the one that waits for others does not count any more. */
  withdraw(member: Member, index: number): void {
    this.#gathering.withdraw(member, index)
  }

  /**
   * Where a member's part of a gradient is received; undefined where it has memory of its own. It must have been
   * expected, and none that the member sent before may wait for its update.
   */
  receive(member: Member, index: number, step: Step): Receiver | undefined {
    return this.#gathering.receive(member, index, step)
  }

  /**
   * Takes a part of a gradient that has come whole; answers the update once the gradient is computed, or computed
   * again. Takes the part's regions over, and releases them when the lane and the journal have read them, whatever
   * comes of it. Undefined: the member that sent it has lost the run, or has sent another part since.
   */
  async compute(part: Part): Promise<ScaledUpdate | undefined> {
    try {
      // An import may have come between the gradient's first chunk and its last.
      this.#host.stepOfGradient(part.index, part.step.number)
      /* c8 ignore next -- it may be lost while its last chunk is stored */
      return part.member.lost ? undefined : await this.#gathering.add(part)
    } finally {
      part.gradient.release()
      part.source?.release()
    }
  }

  /**
   * A member's `end` has come, before its updates have gone out. Throws RANGE_MISSING where no member has some
   * elements, and STEP_CONFLICT for parameters that it skips and all others send.
   */
  beginEnd(member: Member, number: number, skipped: readonly number[]): void {
    const { steps, shard } = this.#host
    const step = steps.of(number, `end for step ${number}`)
    step.checkAccepted(member)
    if (step !== steps.current) return
    for (const index of skipped) shard.place(index)
    this.members.layout.checkCovered(number)
    this.#gathering.skip(member, skipped)
  }

  /**
   * Ends a member's part of a step, in which every parameter was applied or is skipped, or answers a finished one's
   * receipt again. The step is finished when all members have ended theirs; undefined: the member was lost before.
   * Throws STORAGE_FAILED where a journal cannot have the step: it is not finished then.
   */
  async end(member: Member, number: number, skipped: readonly number[]): Promise<Receipt | undefined> {
    const { steps, shard } = this.#host
    const held = this.#host.held()
    if (held) await held
    const step = steps.of(number, `end for step ${number}`)
    step.checkAccepted(member)
    const last = this.#host.last()
    if (step === steps.finished && last) return { ...last, replayed: true }
    try {
      checkComplete(step, shard, { member, skipped: new Set(skipped) })
    } catch (error) {
      this.#gathering.unskip(member)
      throw error
    }
    /* c8 ignore next -- it may be lost while work is done between two steps */
    if (member.lost) return undefined
    const receipt = this.#ending.wait(member)
    this.#begin(member, step)
    if (this.#ending.size === this.members.layout.world_size) this.#ending.settle(this.#conclude(step))
    return receipt
  }

  /**
   * The gradient of a parameter as it was applied for a step; undefined where it is not kept. The caller releases it.
   */
  applied(index: number, step: number): ReturnType<Gathering['applied']> {
    return this.#gathering.applied(index, step)
  }

  /** The step in progress is finished. */
  finish(): void {
    this.#gathering.finish()
  }

  /** The run is elsewhere in its history. */
  forget(): void {
    this.#gathering.forget()
  }

  /** Gives all memory back. The run has no member and no job any more. */
  close(): void {
    this.#gathering.forget()
    this.#closeBuffers()
  }

  #conclude(step: Step): Receipt | Promise<Receipt> {
    return this.#host.conclude(step, this.members.layout.named ? this.#ending.waited : [])
  }

  /** Has the values of a member's step fixed, which may be what the gradients that have come have waited for. */
  #begin(member: Member, step: Step): void {
    if (step.begin(member) && step === this.#host.steps.current) this.#gathering.begun()
  }

  /** Nobody waits any more for what a member has sent. */
  #lose(member: Member): void {
    this.#ending.leave(member)
    this.#gathering.leave(member)
  }

  /** A member that is lost before anything of a step was applied has not begun it. */
  async #forgetLost(member: Member): Promise<void> {
    await this.#host.settled()
    const isBack = this.members.connected.some(({ rank }) => rank === member.rank)
    if (!isBack) this.#host.steps.current.forget(member)
  }

  #gather(layout: Layout): Gathering {
    const { parameters, steps } = this.#host
    const compute = (whole: Whole) => this.#host.compute(whole)
    const buffers = layout.named ? this.#buffers : undefined
    return new Gathering({ parameters, layout, buffers, current: () => steps.current, compute })
  }

  /** Goes on in another layout. One with members keeps what the one before it has kept, if that had members, too. */
  #relay(layout: Layout): void {
    if (layout.named && this.#gathering.keeps) this.#gathering.relay(layout)
    else {
      this.#gathering.forget()
      this.#gathering = this.#gather(layout)
      if (!layout.named) this.#closeBuffers()
    }
    this.#host.steps.current.forgetAll()
  }

  #closeBuffers(): void {
    this.#buffers?.close()
    this.#buffers = undefined
  }
}
