import assert from 'node:assert'
import { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { Member } from '../members/member.js'
import type { Ranks } from '../members/ranks.js'
import { answered, type Update } from '../place.js'
import { inSlices } from '../slices.js'
import { findingNotFinite } from './not-finite.js'
import { type Compute, type Part, passed, type Receiver, type Region, Slot, type Waiting, type Whole } from './part.js'
import type { Step } from './step.js'
import type { Updates } from './updates.js'

export type GatheringMeans = {
  parameters: readonly Parameter[]
  ranks: Ranks
  /** Undefined for a run's only member: its gradients are whole when they come, and go to no gathering. */
  memory: { gradient: (index: number) => Region; updates: Updates } | undefined
  /** The step in progress. */
  current: () => Step
  /** Told of a gradient that is whole, and again whenever a member begins the step. */
  whole: (index: number, step: Step) => void
}

/** Where the parts that the ranks of one replica send become gradients, whose updates answer every part. */
export class Gathering {
  readonly #means: GatheringMeans
  readonly #slots = new Map<number, Slot>()
  /** What members skip in the step in progress, by rank. */
  readonly #skips = new Map<number, ReadonlySet<number>>()
  readonly #computing = new Set<Promise<void>>()

  constructor(means: GatheringMeans) {
    this.#means = means
  }

  get ranks(): Ranks {
    return this.#means.ranks
  }

  /**
   * Where a member's part of a gradient goes; undefined for the only member, whose gradients have memory of their own.
   * The newest part of a member counts: one that waits for others is forgotten, and its answer is that there is none.
   */
  receive(member: Member, index: number, step: Step): Receiver | undefined {
    const { memory } = this.#means
    if (!memory) return undefined
    const slot = this.#slot(index)
    const region = memory.gradient(index)
    const isKept = memory.updates.of(index, step.number) !== undefined && step.hasApplied(index)
    if (isKept && !slot.spoiled.has(member.rank)) return { region, repeated: { differs: false } }
    slot.spoiled.add(member.rank)
    return { region }
  }

  /** Forgets a member's part of a gradient that waits for others, if there is one. */
  withdraw({ rank }: Member, index: number): void {
    const slot = this.#slots.get(index)
    if (!slot || slot.computing) return
    slot.parts.get(rank)?.resolve(undefined)
    if (slot.parts.delete(rank)) slot.version += 1
  }

  /**
   * Takes a part; answers the update once there is one, undefined where the member is lost or has sent another part.
   */
  async add(part: Part): Promise<Update | undefined> {
    const { member, index, step } = part
    const slot = this.#slot(index)
    if (part.repeated) return this.#repeat(part)
    this.#checkMixture(member, index, step)
    this.#outdate(slot, part)
    const update = new Promise<Update | undefined>((resolve, reject) => {
      slot.parts.set(member.rank, { ...part, resolve, reject })
    })
    slot.version += 1
    this.#tell(index, slot)
    this.#checkReachable(index, slot)
    return update
  }

  /** Whether a member's part of a gradient is there. */
  has({ rank }: Member, index: number): boolean {
    return this.#slots.get(index)?.parts.has(rank) ?? false
  }

  /** A number that changes with every part of a gradient that comes or goes. */
  version(index: number): number {
    return this.#slot(index).version
  }

  /** Whether all parts of a gradient of a step are there, and none of it is computed. */
  isWhole(index: number, step: Step): boolean {
    const slot = this.#slots.get(index)
    if (!slot || slot.computing) return false
    const [first] = slot.parts.values()
    const parameter = this.#means.parameters[index]
    return first?.step === step && elementsOf(slot, parameter) === parameter.elements
  }

  /** The gradients of a step that are whole. */
  wholes(step: Step): number[] {
    return [...this.#slots.keys()].filter((index) => this.isWhole(index, step))
  }

  /** A member has begun the step in progress. */
  begun(): void {
    if (!this.#means.memory) return
    for (const [index, slot] of this.#slots) {
      if (slot.parts.size === 0) continue
      this.#tell(index, slot)
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

  /** Forgets all parts that wait: no member is answered. */
  drop(): void {
    this.#skips.clear()
    for (const slot of this.#slots.values()) this.#settle(slot, ({ resolve }) => resolve(undefined))
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
    for (const { spoiled } of this.#slots.values()) spoiled.clear()
  }

  /** Goes on with other ranks. Nothing is computed and no part waits. */
  relay(ranks: Ranks): void {
    this.#means.ranks = ranks
    for (const [index, slot] of this.#slots) {
      /* c8 ignore next -- the layout changes while a repeated gradient is half there */
      if (slot.spoiled.size > 0) this.#means.memory?.updates.drop(index)
      slot.spoiled.clear()
    }
  }

  /** Whether what lies in the memory of a gradient is what was applied, and nothing of a later step. */
  isKept(index: number): boolean {
    /* c8 ignore next -- nobody may have sent it yet */
    return (this.#slots.get(index)?.spoiled.size ?? 0) === 0
  }

  /** Has a gradient that is whole computed, and answers its parts. */
  compute(index: number, compute: Compute): void {
    const slot = this.#slot(index)
    const [first] = slot.parts.values()
    const computing = this.#compute(slot, first, compute).finally(() => this.#computing.delete(computing))
    this.#computing.add(computing)
  }

  /** A gradient that is whole is computed from here on: none of its parts may change. */
  hold(index: number): void {
    this.#slot(index).computing = true
  }

  /** A gradient was computed: its parts are answered with an update, whose memory is the caller's. */
  answer(index: number, update: Update): void {
    const slot = this.#slot(index)
    slot.spoiled.clear()
    this.#settle(slot, ({ resolve }) => resolve({ ...update, memory: update.memory.retain() }))
  }

  /** A gradient was not applied: its parts are refused, and have to be sent again. */
  refuse(index: number, error: unknown): void {
    this.#settle(this.#slot(index), ({ reject }) => reject(error))
  }

  /** Says of an error which members' parts of a gradient hold NaN or Inf, if that is what it is about. */
  async blame(error: unknown, index: number): Promise<unknown> {
    const isNotFinite = error instanceof ServiceError && error.code === 'GRADIENT_NOT_FINITE'
    /* c8 ignore next -- the device lacks memory */
    if (!isNotFinite) return error
    const parameter = this.#means.parameters[index]
    const members = await inSlices(blaming([...this.#slot(index).parts.values()], parameter))
    const names = members.map(({ name }) => name).join(', ')
    /* c8 ignore next -- finite gradients whose update or state is not */
    const who = names === '' ? 'no rank sent NaN or Inf' : `NaN or Inf was sent by ${names}`
    return new ServiceError('GRADIENT_NOT_FINITE', `${error.message}; ${who}`, error.fields)
  }

  #slot(index: number): Slot {
    const known = this.#slots.get(index)
    if (known) return known
    const slot = new Slot()
    this.#slots.set(index, slot)
    return slot
  }

  #repeat({ member, index, step, repeated }: Part): Update | undefined {
    const { name } = this.#means.parameters[index]
    const fields = { parameter: index, step: step.number, expected_step: step.expected }
    const kept = this.#means.memory?.updates.of(index, step.number)
    if (kept && !repeated?.differs) return { ...kept, memory: kept.memory.retain(), replayed: true }
    const message = `parameter '${name}' was applied for step ${step.number} with another gradient of ${member.name}`
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
    this.#settle(slot, ({ reject }) => reject(passed(one, expected)))
  }

  /** A replay is put together of the parts of all members: it is given up once one of them has begun the next step. */
  #checkReachable(index: number, slot: Slot): void {
    const { ranks, parameters, current } = this.#means
    const [one] = slot.parts.values()
    const now = current()
    if (!one || slot.computing || one.step.number >= now.number) return
    const isPassed = ranks.owners(parameters[index]).some((rank) => {
      return !slot.parts.has(rank) && now.isBegunBy(ranks.idOf(rank))
    })
    if (isPassed) this.#settle(slot, ({ reject }) => reject(passed(one, now.number)))
  }

  #tell(index: number, slot: Slot): void {
    const [first] = slot.parts.values()
    if (first && this.isWhole(index, first.step)) this.#means.whole(index, first.step)
  }

  async #compute(slot: Slot, part: Waiting, compute: Compute): Promise<void> {
    const { step, index, gradient, contributors } = part
    const { memory } = this.#means
    assert(memory, 'parts are put together in memory of their own')
    slot.computing = true
    try {
      const whole: Whole = {
        ...{ step, index, gradient, contributors },
        target: () => memory.updates.take(index),
        // What several have sent their parts for goes with none of them.
        ticket: { cancelled: false },
        explain: (error) => this.blame(error, index),
      }
      const update = await answered((answer) => compute(whole, answer))
      /* c8 ignore next -- the device is closed meanwhile */
      if (!update) return this.#settle(slot, ({ resolve }) => resolve(undefined))
      memory.updates.keep(index, step.number, update)
      this.answer(index, update)
    } catch (error) {
      this.refuse(index, error)
    }
  }

  /** Lets all parts of a gradient go. */
  #settle(slot: Slot, settle: (waiting: Waiting) => void): void {
    const settled = [...slot.parts.values()]
    slot.computing = false
    slot.parts.clear()
    slot.version += 1
    for (const part of settled) settle(part)
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
    const { ranks, parameters } = this.#means
    const sent = this.#slots.get(index)?.parts
    return ranks
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

function elementsOf({ parts }: Slot, parameter: Parameter): number {
  return [...parts.values()].reduce((sum, { member }) => sum + member.elements(parameter), 0)
}

function* blaming(parts: readonly Waiting[], parameter: Parameter): Generator<undefined, Member[]> {
  const members: Member[] = []
  for (const { member, gradient } of parts) {
    const isBad = yield* findingNotFinite(gradient.view, member.gradient(parameter), parameter.gradient_dtype)
    if (isBad) members.push(member)
  }
  return members.sort((one, other) => one.rank - other.rank)
}
