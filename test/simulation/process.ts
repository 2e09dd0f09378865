import type { Room } from '../../src/cluster/assignment.js'
import type { ShardPoint, ShardState } from '../../src/cluster/recovery.js'
import type { Vote } from '../../src/cluster/vote.js'
import type { Whole } from '../../src/cluster/whole.js'
import { ServiceError } from '../../src/errors.js'
import { mix } from '../cluster/records.js'
import { Head, type Placed } from './head.js'
import { SimulatedShard } from './shard.js'
import type { Site } from './site.js'
import { Actor } from './world.js'

const TICK_MS = 1000
const FREE_BYTES = 2 ** 40
/** A vote that no head has taken is sent again after so long. */
const VOTE_AGAIN_MS = 1500

/** A process of the cluster from its start to its kill: it has shards in memory, and may be head. */
export class SimulatedProcess {
  readonly url: string
  readonly actor: Actor
  readonly #site: Site
  readonly #shards = new Map<number, SimulatedShard>()
  readonly #head: Head
  /** Votes that are being sent: a trainer may end a step again and again. */
  readonly #voting = new Set<string>()
  /** Who was alive by the coordinator's newest answer. */
  #peers: readonly Room[] = []

  constructor(site: Site, place: string, life: number) {
    this.#site = site
    this.actor = new Actor(place, `${place}/${life}`)
    // A process that comes back with its disk is the same one.
    this.url = site.moves ? this.actor.name : place
    this.#head = new Head(site, this)
    void this.#tick()
  }

  get peers(): readonly Room[] {
    return this.#peers
  }

  /** The process that this one takes for the head: the highest rendezvous hash of those that are alive. */
  get headUrl(): string | undefined {
    const urls = this.#peers.map(({ url }) => url)
    return urls.reduce<string | undefined>((best, url) => (best && rank(best) >= rank(url) ? best : url), undefined)
  }

  /** A trainer opens the whole. */
  async place(): Promise<Placed> {
    return this.#head.place()
  }

  async end(step: number): Promise<string> {
    return (await this.#head.whole().ended(step)).digest
  }

  async takeVote(vote: Vote): Promise<void> {
    const whole = this.#head.whole()
    if (vote.generation !== whole.generation) this.#site.monitor.saw('old votes refused')
    whole.vote(vote)
  }

  /** Where the whole is, for a process that is to open a shard of it. */
  async stand(): Promise<Pick<Whole, 'generation' | 'standing'>> {
    const { generation, standing } = this.#head.whole()
    return { generation, standing }
  }

  /** A trainer has the whole go back to where all shards can be. */
  goBack(): Promise<void> {
    return this.#head.goBack()
  }

  /** The head gives this process a shard. */
  async openShard(index: number, generation: number, standing: ShardPoint): Promise<ShardState> {
    return this.#shardOf(index).open(generation, standing)
  }

  /** A trainer opens a shard. Where shards do not move their process asks the head whether it may. */
  async enter(index: number, generation: number): Promise<ShardPoint> {
    if (this.#site.moves) return this.shard(index).opened(generation)
    const whole = await this.#site.call(this.actor, this.headUrl, (head) => head.stand())
    const { step, shards } = whole.standing
    if (whole.generation !== generation)
      throw new ServiceError('STALE_GENERATION', `generation ${generation} is not ${whole.generation}`)
    return this.#shardOf(index).admit(generation, { step, digest: shards[index]! })
  }

  async goTo(index: number, generation: number, digest: string): Promise<void> {
    await this.shard(index).goTo(generation, digest)
  }

  /** Throws RUN_NOT_FOUND for a shard that this process has not. */
  shard(index: number): SimulatedShard {
    const shard = this.#shards.get(index)
    if (shard) return shard
    throw new ServiceError('RUN_NOT_FOUND', `${this.url} does not have shard ${index}`)
  }

  #shardOf(index: number): SimulatedShard {
    const { parameters, ...rest } = this.#site
    const known = this.#shards.get(index)
    if (known) return known
    const parts = { ...rest, index, parameters: parameters[index]!, actor: this.actor }
    const shard = new SimulatedShard({ ...parts, ...this.#site.bugs, vote: (vote) => void this.#vote(vote) })
    this.#shards.set(index, shard)
    return shard
  }

  /** Who is alive: the coordinator's newest answer, or all where nobody says so. */
  async #look(): Promise<void> {
    const { coordinator, moves, places } = this.#site
    if (!moves) {
      this.#peers = places.map((url) => ({ url, free_bytes: FREE_BYTES }))
      return
    }
    const renewed = coordinator.renew(this.actor, { url: this.url, free_bytes: FREE_BYTES })
    // Without an answer it goes by what it knew.
    this.#peers = await renewed.catch(() => this.#peers)
  }

  async #tick(): Promise<void> {
    const { world } = this.#site
    for (;;) {
      await this.#look()
      this.#head.consider()
      await world.sleep(TICK_MS, this.actor)
    }
  }

  /** Sends a vote until a head has taken or refused it, or the shard is further. */
  async #vote(vote: Vote): Promise<void> {
    const { world } = this.#site
    const { shard: index, generation, step } = vote
    const key = `${index} ${generation} ${step}`
    if (this.#voting.has(key)) return
    this.#voting.add(key)
    const isCurrent = () => this.shard(index).generation === generation && this.shard(index).step <= step
    while (isCurrent() && !(await this.#isTaken(vote))) await world.sleep(VOTE_AGAIN_MS, this.actor)
    this.#voting.delete(key)
  }

  /** Whether a head has taken a vote, or has refused it for good. */
  async #isTaken(vote: Vote): Promise<boolean> {
    try {
      await this.#site.call(this.actor, this.headUrl, (head) => head.takeVote(vote))
      return true
    } catch (error) {
      return error instanceof ServiceError && error.code !== 'RUN_NOT_FOUND'
    }
  }
}

function rank(url: string): number {
  return mix(...[...url].map((letter) => letter.charCodeAt(0)))
}
