import type { Room } from '../../src/cluster/assignment.js'
import type { ShardPoint, ShardState } from '../../src/cluster/recovery.js'
import type { Vote } from '../../src/cluster/vote.js'
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
    this.url = `${place}/${life}`
    this.actor = new Actor(place, this.url)
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

  /** The head gives this process a shard. */
  async openShard(index: number, generation: number, standing: ShardPoint): Promise<ShardState> {
    const { parameters, ...rest } = this.#site
    let shard = this.#shards.get(index)
    if (!shard) {
      const parts = { ...rest, index, parameters: parameters[index]!, actor: this.actor }
      shard = new SimulatedShard({ ...parts, ...this.#site.bugs, vote: (vote) => void this.#vote(vote) })
      this.#shards.set(index, shard)
    }
    return shard.open(generation, standing)
  }

  async goTo(index: number, generation: number, digest: string): Promise<void> {
    this.shard(index).goTo(generation, digest)
  }

  /** Throws RUN_NOT_FOUND for a shard that this process has not. */
  shard(index: number): SimulatedShard {
    const shard = this.#shards.get(index)
    if (shard) return shard
    /* c8 ignore next 2 -- whoever asks knows the address of this life, which the head has given the shard */
    throw new ServiceError('RUN_NOT_FOUND', `${this.url} does not have shard ${index}`)
  }

  async #tick(): Promise<void> {
    const { world, coordinator } = this.#site
    for (;;) {
      try {
        this.#peers = await coordinator.renew(this.actor, { url: this.url, free_bytes: FREE_BYTES })
      } catch {
        // It goes by what it knew.
      }
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
