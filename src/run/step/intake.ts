import type { Device } from '../../device/device.js'
import type { ServiceError } from '../../errors.js'
import { checkMaxLogits } from '../../optimizer/qk-clip.js'
import type { StepFrame } from '../../wire/frame.js'
import type { Receipt } from '../history.js'
import type { Layout } from '../members/layout.js'
import type { Connection, Member, Seat } from '../members/member.js'
import { Members } from '../members/members.js'
import type { Answer, Update } from '../place.js'
import { Replicas } from '../replicas/replicas.js'
import { Buffers } from './buffers.js'
import { checkComplete } from './conclusion.js'
import { type Ended, Ending } from './ending.js'
import { Gathering } from './gathering.js'
import type { Host } from './host.js'
import { meanDemands } from './mean-demands.js'
import type { Part, Receiver, Region } from './part.js'
import type { Step, StepValues } from './step.js'
import { Updates } from './updates.js'

/** What a member's `end` says: `weight` is that of its replica in the mean of several. */
export type GivenEnd = { readonly step: number; readonly skipped: readonly number[]; readonly weight: number }

/** What the members of a run send: it holds each frame against the step in progress, and has all of them at its end. */
export class Intake {
  readonly members: Members
  readonly #host: Host
  readonly #device: Device
  readonly #ending = new Ending()
  /** What the ranks of each replica send. */
  #gatherings: readonly Gathering[]
  /** Set where gradients are means of several replicas. */
  #replicas: Replicas | undefined
  /** Undefined until members put gradients together. */
  #buffers: Buffers | undefined
  #updates: Updates | undefined

  constructor(device: Device, host: Host) {
    this.#device = device
    this.#host = host
    this.members = new Members(host.name, host.parameters, (status) => host.changed(status))
    this.#gatherings = this.#gather(this.members.layout)
  }

  /** The numbers of the members whose `end` of the step in progress has come. */
  get ended(): readonly number[] {
    return this.#ending.ids
  }

  /**
   * Whether gradients are means of several replicas: then they are computed when the step is closed, and no update
   * comes before that.
   */
  get averages(): boolean {
    return this.#replicas !== undefined
  }

  /** Whether gradients are put together from the parts that several members send. */
  get gathers(): boolean {
    return this.members.layout.named
  }

  /**
   * Makes the memory ready in which the members of a layout put their gradients together, and the device. Throws
   * OVER_CAPACITY with the bytes.
   */
  async prepare(layout: Layout): Promise<void> {
    if (!layout.named) return
    const { name, parameters, groups } = this.#host
    this.#buffers ??= new Buffers(this.#device, parameters, name)
    const demands = layout.averages ? meanDemands(parameters, groups()) : []
    this.#buffers.reserve(layout.replicas, demands)
    if (demands.length > 0) await this.#device.load(demands)
  }

  /**
   * Gives a connection its seat in a layout; the only member has none. The jobs of the member before settle first: the
   * parameters that they applied show in `ahead`, and their values hold for the step; with nothing applied the values
   * are forgotten. Throws OVER_CAPACITY where the members' parts lack memory.
   */
  async attach(connection: Connection, seat?: Seat, layout: Layout = this.members.layoutFor(seat)): Promise<Member> {
    const isNew = layout !== this.members.layout
    if (layout.named) await this.prepare(layout)
    const { member, older } = this.members.take(connection, layout, seat)
    for (const other of older) {
      this.#lose(other)
      other.fence()
    }
    await this.#idle()
    if (isNew) this.#relay(layout)
    else this.#host.steps.current.forget(member)
    this.#replicas?.closing.consider()
    return member
  }

  /** The member's connection is gone. Jobs that no lane has begun are dropped, unless others sent parts for them. */
  detach(member: Member): void {
    member.lose()
    if (!this.members.leave(member)) return
    this.#lose(member)
    this.#replicas?.closing.consider()
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
    if (this.drops(member, number)) return
    const step = this.#host.steps.of(number, `a step frame for step ${number}`)
    this.#checkIncluded(member, step)
    step.refuse(member)
    const values: Partial<StepValues> = {
      ...(groups && { groups }),
      ...(gradient_scale !== undefined && { gradient_scale }),
      max_logits: checkMaxLogits(this.#host.attentions, max_logits, number),
    }
    step.announce(member, values)
    if (traceparent !== undefined && member.id === 0) step.traceparent = traceparent
    this.#begun()
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
   * neither can be, with `left_out` where the step was closed without the member's replica.
   */
  expect(member: Member, index: number, number: number): Step {
    const known = this.#host.steps.find(number)
    if (known) this.#checkIncluded(member, known)
    const step = this.#host.stepOfGradient(index, number)
    step.checkAccepted(member)
    this.#begin(member, step)
    return step
  }

  /** Whether frames of a step are dropped because the member was told that it was closed without its replica. */
  drops(member: Member, number: number): boolean {
    return this.#replicas?.lates.isTold(member, number) ?? false
  }

  /** A member sends its part of a gradient again: the one that waits for others does not count any more. */
  withdraw(member: Member, index: number): void {
    this.#of(member).withdraw(member, index)
  }

  /**
   * Where a member's part of a gradient is received; undefined where it has memory of its own. It must have been
   * expected, and none that the member sent before may wait for its update.
   */
  receive(member: Member, index: number, step: Step): Receiver | undefined {
    return this.#of(member).receive(member, index, step)
  }

  /**
   * Takes a part of a gradient that has come whole; `answer` has the update once the gradient is computed, or computed
   * again, and the part's regions are the caller's again. With undefined: the member that sent it has lost the run, has
   * sent another part since, or is left out.
   */
  compute(part: Part, answer: Answer): void {
    const { member, step, index } = part
    /* c8 ignore next -- it may be lost, or the step be closed, while its last chunk is stored */
    if (member.lost || this.#isLeftOut(member, step)) return answer.resolve(undefined)
    const isParted = this.members.layout.named
    if (!isParted) return this.#host.compute({ ...part, ticket: member.ticket }, answer)
    this.#gathered(index, part).then(
      (update) => answer.resolve(update),
      (error) => answer.reject(error),
    )
  }

  async #gathered(index: number, part: Part): Promise<Update | undefined> {
    // An import may have come between the gradient's first chunk and its last.
    this.#host.stepOfGradient(index, part.step.number)
    return await this.#of(part.member).add(part)
  }

  /**
   * A member's `end` has come, before its updates have gone out. Throws RANGE_MISSING where no member has some
   * elements, and STEP_CONFLICT for parameters that it skips and all others send.
   */
  beginEnd(member: Member, { step: number, skipped }: GivenEnd): void {
    const { steps, shard } = this.#host
    const step = steps.of(number, `end for step ${number}`)
    step.checkAccepted(member)
    if (step !== steps.current) return
    for (const index of skipped) shard.place(index)
    this.#of(member).ranks.checkCovered(number)
    this.#of(member).skip(member, skipped)
  }

  /**
   * Ends a member's part of a step, in which every parameter was applied or is skipped (or, with several replicas, was
   * sent), or answers a finished one's receipt again. The step is finished when all members have ended theirs, or a
   * quorum of replicas has; undefined: the member was lost before. Throws STORAGE_FAILED where a journal cannot have
   * the step: it is not finished then.
   */
  async end(member: Member, given: GivenEnd): Promise<Ended> {
    const { step: number, skipped, weight } = given
    const { steps } = this.#host
    const held = this.#host.held()
    if (held) await held
    const step = steps.of(number, `end for step ${number}`)
    step.checkAccepted(member)
    const last = this.#host.last()
    if (step === steps.finished && last) return this.#receiptFor(member, { ...last, replayed: true })
    /* c8 ignore next -- a step may be closed while work is done between two steps */
    if (this.#isLeftOut(member, step)) return 'left_out'
    try {
      this.#checkComplete(member, step, skipped)
      this.#replicas?.checkEnd(member, step, given)
    } catch (error) {
      this.#of(member).unskip(member)
      throw error
    }
    /* c8 ignore next -- it may be lost while work is done between two steps */
    if (member.lost) return undefined
    const ended = this.#ending.wait({ member, weight, skipped })
    this.#begin(member, step)
    if (this.#replicas) this.#replicas.closing.consider()
    else if (this.#ending.size === this.members.layout.world_size) this.#ending.settle(this.#conclude(step))
    return ended.then((receipt) => (typeof receipt === 'object' ? this.#receiptFor(member, receipt) : receipt))
  }

  /**
   * Whether a step was closed without the member's replica; the member is to be told, or was. Throws STEP_CONFLICT for
   * a step that the run has not any more.
   */
  isLeftOut(member: Member, number: number): boolean {
    return this.drops(member, number) || this.#isLeftOut(member, this.#host.steps.of(number, `end for step ${number}`))
  }

  /** What a member has to be told that is left out of a step, and what it has missed: its updates and its receipt. */
  catchUp(member: Member, number: number): ReturnType<Replicas['catchUp']> {
    /* c8 ignore next -- only of several replicas one is left out */
    return this.#replicas?.catchUp(member, number) ?? { missed: Promise.resolve(undefined) }
  }

  /**
   * The gradient of a parameter as it was applied for a step; undefined where it is not kept. The caller releases it.
   */
  applied(index: number, step: number): Region | undefined {
    if (!this.#updates?.of(index, step)) return undefined
    if (this.averages) return this.#buffers?.mean(index)
    /* c8 ignore next -- a part of a later step may have come since */
    return this.#gatherings[0].isKept(index) ? this.#buffers?.gradient(0, index) : undefined
  }

  /** The step in progress is finished. */
  finish(): void {
    for (const gathering of this.#gatherings) gathering.finish()
  }

  /** The run is elsewhere in its history. */
  forget(): void {
    this.#updates?.forget()
    for (const gathering of this.#gatherings) gathering.forget()
  }

  /** Gives all memory back. The run has no member and no job any more. */
  close(): void {
    this.#replicas?.close()
    this.#closeBuffers()
  }

  #of(member: Member): Gathering {
    return this.#gatherings[member.replica]
  }

  #conclude(step: Step): Receipt | Promise<Receipt> {
    return this.#host.conclude(step, this.members.layout.named ? this.#ending.waited : [])
  }

  /** A receipt as a member is sent it. */
  #receiptFor({ replica }: Member, receipt: Receipt): Receipt {
    if (!this.averages) return receipt
    /* c8 ignore next -- with replicas every receipt says which have contributed */
    return { ...receipt, contributed: receipt.contributors?.some((one) => one.replica === replica) ?? false }
  }

  #checkComplete(member: Member, step: Step, skipped: readonly number[]): void {
    const isThere = (index: number) => step.hasApplied(index) || (this.averages && this.#of(member).has(member, index))
    checkComplete(step, this.#host.shard, { member, skipped: new Set(skipped), isThere })
  }

  /** Takes back the `end`s of members of a replica that lack something now: a gradient of theirs was refused. */
  #recheck(replica: number): void {
    for (const { member, skipped } of this.#ending.of(replica)) {
      try {
        this.#checkComplete(member, this.#host.steps.current, skipped)
      } catch (error) {
        this.#of(member).unskip(member)
        this.#ending.settle(Promise.reject(error), [member])
      }
    }
  }

  #isLeftOut({ replica }: Member, step: Step): boolean {
    return this.averages && step.isLeftOut(replica)
  }

  /** Throws STEP_CONFLICT where a step was closed without the member's replica. */
  #checkIncluded(member: Member, step: Step): void {
    if (this.#replicas && this.#isLeftOut(member, step)) throw this.#replicas.lates.tell(member, step)
  }

  /** Has the values of a member's step fixed, which may be what the gradients that have come have waited for. */
  #begin(member: Member, step: Step): void {
    if (!step.begin(member) || step !== this.#host.steps.current) return
    this.#replicas?.lates.leave(member)
    this.#begun()
  }

  #begun(): void {
    for (const gathering of this.#gatherings) gathering.begun()
    this.#replicas?.averaging.begun()
  }

  /** Nobody waits any more for what a member has sent. */
  #lose(member: Member): void {
    this.#ending.leave(member)
    this.#of(member)?.leave(member)
    this.#replicas?.lates.leave(member)
  }

  /** When nothing is computed, and no step is being closed. */
  async #idle(): Promise<void> {
    await this.#host.settled()
    for (const gathering of this.#gatherings) await gathering.idle()
    await this.#replicas?.idle()
  }

  /** A member that is lost before anything of a step was applied has not begun it. */
  async #forgetLost(member: Member): Promise<void> {
    await this.#idle()
    const isBack = this.members.connected.some(({ id }) => id === member.id)
    if (!isBack) this.#host.steps.current.forget(member)
  }

  #gather(layout: Layout): Gathering[] {
    return Array.from({ length: layout.replicas }, (_, replica) => this.#gatherReplica(layout, replica))
  }

  #gatherReplica(layout: Layout, replica: number): Gathering {
    const { parameters, steps, compute } = this.#host
    const [buffers, updates] = [this.#buffers, this.#updates]
    const memory = buffers && updates && { gradient: (index: number) => buffers.gradient(replica, index), updates }
    const gathering: Gathering = new Gathering({
      ...{ parameters, ranks: layout.ranks(replica), memory, current: () => steps.current },
      whole: (index, step) => {
        if (this.#replicas) this.#replicas.averaging.whole(replica, index, step)
        else if (step.hasApplied(index) || step.isBegunByAll(gathering.ranks.world_size))
          gathering.compute(index, compute)
      },
    })
    return gathering
  }

  /** Goes on in another layout. One with members keeps what the one before it has kept, with as many replicas. */
  #relay(layout: Layout): void {
    this.#replicas?.closing.stop()
    const isAlike = layout.named && this.#updates && this.#gatherings.length === layout.replicas
    if (isAlike) for (const [replica, gathering] of this.#gatherings.entries()) gathering.relay(layout.ranks(replica))
    else this.#renew(layout)
    this.#host.steps.current.forgetAll()
  }

  #renew(layout: Layout): void {
    this.#replicas?.close()
    this.#replicas = undefined
    this.#updates?.close()
    this.#updates = layout.named ? new Updates(this.#device, this.#host.parameters) : undefined
    if (layout.named) this.#buffers?.trim(layout.replicas)
    else this.#closeBuffers()
    this.#gatherings = this.#gather(layout)
    if (!layout.averages || !this.#buffers || !this.#updates) return
    this.#replicas = new Replicas({
      ...{ host: this.#host, device: this.#device, members: this.members, ending: this.#ending },
      ...{ buffers: this.#buffers, updates: this.#updates, gatherings: this.#gatherings },
      recheck: (replica) => this.#recheck(replica),
    })
  }

  #closeBuffers(): void {
    this.#updates?.close()
    this.#updates = undefined
    this.#buffers?.trim(0)
    this.#buffers = undefined
  }
}
