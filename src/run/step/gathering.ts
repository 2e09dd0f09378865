import type { Ticket } from '../../device/device.js'
import { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { GradientPlaces } from '../place.js'
import type { ScaledUpdate } from '../shard.js'
import { inSlices } from '../slices.js'
import type { Buffers } from './buffers.js'
import type { Layout } from './layout.js'
import type { Member } from './member.js'
import { findingNotFinite } from './not-finite.js'
import type { Step } from './step.js'

/** A member's part of a gradient, which has come whole. */
export type Part = GradientPlaces & { step: Step; index: number; member: Member; repeated?: Repeated }

/** A gradient of which all parts have come; `explain` says more of the error that refuses it. */
export type Whole = GradientPlaces & {
  step: Step
  index: number
  ticket: Ticket
  explain: (error: unknown) => Promise<unknown>
}

/** A part of a gradient that was applied before: it is not stored, but held against the bytes that were applied. */
export type Repeated = { differs: boolean }

/** Where a member's part of a gradient is received. */
export type Receiver = { region: Region; repeated?: Repeated }

type Region = GradientPlaces['gradient']
type Settle = { resolve: (update: ScaledUpdate | undefined) => void; reject: (error: unknown) => void }
type Waiting = Part & Settle

/** What came of a gradient that was applied: its update, which every member that has elements of it is sent. */
type Kept = { step: number; update: ScaledUpdate }

/** One parameter's gradient, as far as it has come. */
class Slot {
  /** The parts of one step that wait for the others, by rank. */
  readonly parts = new Map<number, Waiting>()
  computing = false
  kept: Kept | undefined
  /** Ranks whose elements in the buffer are of a later step than `kept`. */
  readonly spoiled = new Set<number>()
}

export type GatheringMeans = {
  parameters: readonly Parameter[]
  layout: Layout
  /** Undefined for a run's only member: its gradients are whole when they come, and their updates are not kept. */
  buffers: Buffers | undefined
  /** The step in progress. */
  current: () => Step
  /** Computes a gradient that is whole; undefined where its ticket was cancelled. */
  compute: (whole: Whole) => Promise<ScaledUpdate | undefined>
}

/**
 * Where the parts that the members of a run send become gradients. A gradient is computed when all of its elements
 * have come and every member has begun the step; its update then answers every part. The only member's gradient is one
 * part, and is computed at once.
 */
export class Gathering {
  readonly #means: GatheringMeans
  readonly #slots = new Map<number, Slot>()
  /** What members skip in the step in progress, by rank. */
  readonly #skips = new Map<number, ReadonlySet<number>>()
  readonly #computing = new Set<Promise<void>>()

  constructor(means: GatheringMeans) {
    this.#means = means
  }

  /**
   * Where a member's part of a gradient goes; undefined for the only member, whose gradients have memory of their own.
   * The newest part of a member counts: one that waits for others is forgotten, and its answer is that there is none.
   */
  receive(member: Member, index: number, step: Step): Receiver | undefined {
    const { buffers } = this.#means
    if (!buffers) return undefined
    const slot = this.#slot(index)
    const region = buffers.gradient(index)
    const isKept = slot.kept?.step === step.number && step.hasApplied(index)
    if (isKept && !slot.spoiled.has(member.rank)) return { region, repeated: { differs: false } }
    slot.spoiled.add(member.rank)
    return { region }
  }

  /** Forgets a member's part of a gradient that waits for others, if there is one. */
  withdraw({ rank }: Member, index: number): void {
    const slot = this.#slots.get(index)
    if (!slot || slot.computing) return
    slot.parts.get(rank)?.resolve(undefined)
    slot.parts.delete(rank)
  }

  /**
   * Takes a part; answers the update once there is one, undefined where the member is lost or has sent another part.
   */
  async add(part: Part): Promise<ScaledUpdate | undefined> {
    const { member, index, step } = part
    const slot = this.#slot(index)
    if (part.repeated) return this.#repeat(part, slot)
    this.#checkMixture(member, index, step)
    this.#outdate(slot, part)
    const update = new Promise<ScaledUpdate | undefined>((resolve, reject) => {
      slot.parts.set(member.rank, { ...part, resolve, reject })
    })
    this.#tryCompute(index, slot)
    this.#checkReachable(index, slot)
    return update
  }

  /** A member has begun the step in progress. */
  begun(): void {
    if (!this.#means.buffers) return
    for (const [index, slot] of this.#slots) {
      if (slot.parts.size === 0) continue
      this.#tryCompute(index, slot)
      this.#checkReachable(index, slot)
    }
  }

  /**
   * A member's `end` skips parameters: its own parts of these are taken back. Throws STEP_CONFLICT, and changes
   * nothing, where with it every member has said something of a parameter and some have sent it.
   */
  skip(member: Member, skipped: readonly number[]): void {
    const { parameters } = this.#means
    const own = skipped.filter((index) => member.has(parameters[index]) && !this.#slots.get(index)?.computing)
    for (const index of own) this.#checkSkip(member, index)
    for (const index of own) this.withdraw(member, index)
    this.#skips.set(member.rank, new Set(own))
  }

  /** A member's `end` was refused, or went with its connection. */
  unskip({ rank }: Member): void {
    this.#skips.delete(rank)
  }

  /** A member is lost: its parts that wait are forgotten, it sends them again. */
  leave(member: Member): void {
    this.unskip(member)
    for (const [index, slot] of this.#slots)
      if (slot.parts.get(member.rank)?.member === member) this.withdraw(member, index)
  }

  /** The step in progress is finished. */
  finish(): void {
    this.#skips.clear()
  }

  /** When no gradient is computed, and none waits to be. */
  async idle(): Promise<void> {
    /* c8 ignore next -- an import comes while a lane computes */
    while (this.#computing.size > 0) await Promise.all(this.#computing)
  }

  /** The run is elsewhere in its history: what was applied before is none of it. */
  forget(): void {
    for (const slot of this.#slots.values()) release(slot)
  }

  /** Whether updates are kept until every member has them. */
  get keeps(): boolean {
    return this.#means.buffers !== undefined
  }

  /** Goes on in another layout of named members. Nothing is computed and no part waits. */
  relay(layout: Layout): void {
    this.#means.layout = layout
    /* c8 ignore next -- the layout changes while a repeated gradient is half there */
    for (const slot of this.#slots.values()) if (slot.spoiled.size > 0) release(slot)
  }

  /**
   * The gradient of a parameter as it was applied for a step; undefined where it is not kept. The caller releases it.
   */
  applied(index: number, step: number): Region | undefined {
    const slot = this.#slots.get(index)
    if (slot?.kept?.step !== step || slot.spoiled.size > 0) return undefined
    return this.#means.buffers?.gradient(index)
  }

  #slot(index: number): Slot {
    const known = this.#slots.get(index)
    if (known) return known
    const slot = new Slot()
    this.#slots.set(index, slot)
    return slot
  }

  #repeat({ member, index, step, repeated }: Part, { kept }: Slot): ScaledUpdate | undefined {
    const { name } = this.#means.parameters[index]
    const fields = { parameter: index, step: step.number, expected_step: step.expected }
    if (kept?.step === step.number && !repeated?.differs)
      return { ...kept.update, memory: kept.update.memory.retain(), replayed: true }
    const message = `parameter '${name}' was applied for step ${step.number} with another gradient of rank ${member.rank}`
    throw new ServiceError('STEP_CONFLICT', message, fields)
  }

  /**
   * Refuses the parts of an older step that wait: a member that is further sends no more of them. Throws STEP_CONFLICT
   * where the older one is the part that has come.
   */
  #outdate(slot: Slot, part: Part): void {
    const [one] = slot.parts.values()
    if (!one || one.step === part.step) return
    const expected = this.#means.current().number
    if (one.step.number > part.step.number) throw passed(part, expected)
    this.#refuse(slot, passed(one, expected))
  }

  /** A replay is put together of the parts of all members: it is given up once one of them has begun the next step. */
  #checkReachable(index: number, slot: Slot): void {
    const { layout, parameters, current } = this.#means
    const [one] = slot.parts.values()
    const now = current()
    if (!one || slot.computing || one.step.number >= now.number) return
    const isPassed = layout.owners(parameters[index]).some((rank) => !slot.parts.has(rank) && now.isBegunBy(rank))
    if (isPassed) this.#refuse(slot, passed(one, now.number))
  }

  #tryCompute(index: number, slot: Slot): void {
    const { parameters, layout } = this.#means
    const [first] = slot.parts.values()
    const parameter = parameters[index]
    if (!first || slot.computing || elementsOf(slot, parameter) < parameter.elements) return
    const { step } = first
    const isReplay = step.hasApplied(index)
    if (!isReplay && !step.isBegunByAll(layout.world_size)) return
    const computing = this.#compute(index, slot, first).finally(() => this.#computing.delete(computing))
    this.#computing.add(computing)
  }

  async #compute(index: number, slot: Slot, { step, gradient, source, target, member }: Waiting): Promise<void> {
    const { buffers, compute } = this.#means
    slot.computing = true
    const own = buffers && (() => this.#takeUpdate(index, slot, buffers))
    // The only member's job goes with it; one that several have sent their parts for is none of theirs.
    const ticket = buffers ? { cancelled: false } : member.ticket
    try {
      const explain = (error: unknown) => this.#blamed(error, index, slot)
      const update = await compute({ step, index, gradient, source, target: own ?? target, ticket, explain })
      slot.computing = false
      this.#answer(slot, step, update)
    } catch (error) {
      slot.computing = false
      this.#refuse(slot, error)
    }
  }

  #takeUpdate(index: number, slot: Slot, buffers: Buffers): Region {
    slot.kept?.update.memory.release()
    slot.kept = undefined
    return buffers.update(index)
  }

  #answer(slot: Slot, { number: step }: Step, update: ScaledUpdate | undefined): void {
    const answered = [...slot.parts.values()]
    slot.parts.clear()
    if (update && this.#means.buffers) {
      slot.spoiled.clear()
      slot.kept = { step, update }
      for (const { resolve } of answered) resolve({ ...update, memory: update.memory.retain() })
    } else for (const { resolve } of answered) resolve(update)
  }

  #refuse(slot: Slot, error: unknown): void {
    const refused = [...slot.parts.values()]
    slot.parts.clear()
    for (const { reject } of refused) reject(error)
  }

  /** Says which members' parts hold NaN or Inf. */
  async #blamed(error: unknown, index: number, slot: Slot): Promise<unknown> {
    const isNotFinite = error instanceof ServiceError && error.code === 'GRADIENT_NOT_FINITE'
    if (!isNotFinite || !this.#means.buffers) return error
    const parameter = this.#means.parameters[index]
    const ranks = await inSlices(blaming([...slot.parts.values()], parameter))
    /* c8 ignore next -- finite gradients whose update or state is not */
    const who = ranks.length === 0 ? 'no rank sent NaN or Inf' : `NaN or Inf was sent by rank ${ranks.join(', ')}`
    return new ServiceError('GRADIENT_NOT_FINITE', `${error.message}; ${who}`, error.fields)
  }

  /**
   * Throws STEP_CONFLICT where every member has said something of a parameter, this one sends it and another skips it.
   */
  #checkMixture({ rank }: Member, index: number, step: Step): void {
    if (step !== this.#means.current()) return
    const skipping = [...this.#skips].flatMap(([other, skipped]) =>
      other !== rank && skipped.has(index) ? [other] : [],
    )
    if (skipping.length > 0 && this.#haveSpoken(rank, index)) throw this.#mixture(index, { sent: [rank], skipping })
  }

  #checkSkip({ rank }: Member, index: number): void {
    const parts = this.#slots.get(index)?.parts
    if (!parts || parts.size === 0) return
    const sent = [...parts.keys()].filter((other) => other !== rank)
    if (sent.length > 0 && this.#haveSpoken(rank, index)) throw this.#mixture(index, { sent, skipping: [rank] })
  }

  /** Whether every other member with elements of a parameter has sent it or skips it. */
  #haveSpoken(rank: number, index: number): boolean {
    const { layout, parameters } = this.#means
    const sent = this.#slots.get(index)?.parts
    return layout
      .owners(parameters[index])
      .every((other) => other === rank || sent?.has(other) || this.#skips.get(other)?.has(index))
  }

  #mixture(index: number, { sent, skipping }: { sent: number[]; skipping: number[] }): ServiceError {
    const { number: step, expected: expected_step } = this.#means.current()
    const { name } = this.#means.parameters[index]
    const message = `parameter '${name}' is sent by rank ${sent.join(', ')} and skipped by rank ${skipping.join(', ')} in step ${step}: all have to do the same`
    return new ServiceError('STEP_CONFLICT', message, { parameter: index, step, expected_step })
  }
}

function release(slot: Slot): void {
  slot.kept?.update.memory.release()
  slot.kept = undefined
  slot.spoiled.clear()
}

function elementsOf({ parts }: Slot, parameter: Parameter): number {
  return [...parts.values()].reduce((sum, { member }) => sum + member.elements(parameter), 0)
}

function passed({ index, step }: Part, expected_step: number): ServiceError {
  const message = `step ${step.number} of parameter ${index} cannot be computed again: a member has begun step ${expected_step}`
  return new ServiceError('STEP_CONFLICT', message, { parameter: index, step: step.number, expected_step })
}

function* blaming(parts: readonly Waiting[], parameter: Parameter): Generator<undefined, number[]> {
  const ranks: number[] = []
  for (const { member, gradient } of parts) {
    const isBad = yield* findingNotFinite(gradient.view, member.gradient(parameter), parameter.gradient_dtype)
    if (isBad) ranks.push(member.rank)
  }
  return ranks.sort((one, other) => one - other)
}
