import { type Assignment, firstAssignment, nextAssignment } from '../../src/cluster/assignment.js'
import type { ShardState } from '../../src/cluster/recovery.js'
import type { Whole } from '../../src/cluster/whole.js'
import { ServiceError } from '../../src/errors.js'
import type { SimulatedProcess } from './process.js'
import type { Site } from './site.js'

/** What a trainer is told of a whole. */
export type Placed = {
  readonly generation: number
  readonly step: number
  readonly digest: string
  readonly head: string
  readonly peers: readonly string[]
}

/** The part of a process that is head while it takes itself for it: it takes over, serves, and steps down. */
export class Head {
  readonly #site: Site
  readonly #process: SimulatedProcess
  #whole: Whole | undefined
  #isTakingOver = false
  #attempts = 0

  constructor(site: Site, process: SimulatedProcess) {
    this.#site = site
    this.#process = process
  }

  /** Throws RUN_NOT_FOUND where this process is no head, or not yet. */
  whole(): Whole {
    if (this.#whole && !this.#whole.over) return this.#whole
    throw new ServiceError('RUN_NOT_FOUND', `${this.#process.url} is not the head`)
  }

  async place(): Promise<Placed> {
    const whole = this.whole()
    await whole.confirm()
    const { generation, step, digest, assignment } = whole
    return { generation, step, digest, head: this.#process.url, peers: assignment.shards.map(({ peer }) => peer) }
  }

  /** Takes over, or steps down, by who is alive. */
  consider(): void {
    const { url, headUrl, peers } = this.#process
    if (this.#whole?.over) this.#site.monitor.saw('heads deposed')
    if (headUrl !== url) return this.#stepDown()
    if (this.#isTakingOver) return
    const alive = new Set(peers.map((peer) => peer.url))
    const isWell =
      this.#whole && !this.#whole.over && this.#whole.assignment.shards.every(({ peer }) => alive.has(peer))
    if (!isWell) void this.#takeOver()
  }

  #stepDown(): void {
    this.#whole?.close(new ServiceError('STALE_GENERATION', `${this.#process.url} is not the head any more`))
    this.#whole = undefined
  }

  /** `opens`: it has the shards opened, rather than wait until a trainer does. */
  async #takeOver(opens = this.#site.moves): Promise<void> {
    this.#isTakingOver = true
    this.#stepDown()
    try {
      const assignment = await this.#raise()
      if (assignment) this.#whole = await this.#begin(assignment, opens)
    } catch (error) {
      // It tries again with the next tick, in a generation of its own.
      this.#site.world.note(() => `${this.#process.url} does not become head: ${error}`)
    }
    this.#isTakingOver = false
  }

  /** Takes over anew, and has all shards go to a step that is common to them. */
  async goBack(): Promise<void> {
    if (!this.#isTakingOver) await this.#takeOver(true)
  }

  /** The next assignment, in force; undefined where another head was first. */
  async #raise(): Promise<Assignment | undefined> {
    const { coordinator, model, parameters, moves } = this.#site
    const { actor, peers } = this.#process
    if (!moves) return this.#fixed()
    const before = await coordinator.read(actor)
    const next = before
      ? nextAssignment(before, peers, model.parameters)
      : firstAssignment('gpt', model, { rooms: peers, shards: parameters.length })
    return (await coordinator.swap(actor, next, before?.generation)) ? next : undefined
  }

  /** The assignment that there always is, with a generation that no entry of the log has. */
  async #fixed(): Promise<Assignment> {
    const { log, parameters, places } = this.#site
    const newest = await log.of(this.#process.actor).newest()
    const shards = parameters.map((own, i) => ({ peer: places[i % places.length]!, parameters: own }))
    return { run: 'gpt', generation: (newest?.generation ?? 0) + 1, shards }
  }

  async #begin(assignment: Assignment, opens: boolean): Promise<Whole> {
    const { log, code } = this.#site
    const head = `${this.#process.actor.name} ${++this.#attempts}`
    const whole = await code.Whole.begin({ log: log.of(this.#process.actor), assignment, attentions: [], head })
    if (!opens) return whole
    const states = await this.#openShards(whole)
    // Something is common to all: each shard can go to step 0.
    const { step, back } = (await code.recoveryOf(whole, states))!
    if (step !== whole.step) await whole.goTo(step)
    await this.#takeBack(whole, back)
    this.#site.world.note(() => `${head} is head of generation ${assignment.generation} after step ${step}`)
    return whole
  }

  /** Has every process open its shards with the new generation. */
  #openShards({ assignment, standing }: Whole): Promise<ShardState[]> {
    const { generation, shards } = assignment
    const opened = shards.map(({ peer }, index) =>
      this.#site.call(this.#process.actor, peer, (process) =>
        process.openShard(index, generation, { step: standing.step, digest: standing.shards[index]! }),
      ),
    )
    return Promise.all(opened)
  }

  async #takeBack({ assignment, standing: { shards } }: Whole, back: readonly number[]): Promise<void> {
    const gone = back.map((index) =>
      this.#site.call(this.#process.actor, assignment.shards[index]?.peer, (process) =>
        process.goTo(index, assignment.generation, shards[index]!),
      ),
    )
    await Promise.all(gone)
  }
}
