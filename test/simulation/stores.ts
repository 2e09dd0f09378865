import type { Assignment, Room } from '../../src/cluster/assignment.js'
import { type CommitLog, type Entry, isSameEntry } from '../../src/cluster/commit-log.js'
import type { ShardPoint } from '../../src/cluster/recovery.js'
import { ServiceError } from '../../src/errors.js'
import type { Monitor } from './monitor.js'
import { Actor, type World } from './world.js'

/** What a store does wrong for a while. `lateness`: milliseconds at most before a request is carried out. */
export type Trouble = { isRefusing: boolean; lateness: number }

/** Something outside of all processes that answers requests one at a time. */
class Place {
  trouble: Trouble = { isRefusing: false, lateness: 0 }
  /** It is never stopped, and never dies. */
  readonly #self: Actor

  constructor(
    readonly world: World,
    readonly place: string,
    /** It is a disk in each process's own machine: no network is between them. */
    readonly isLocal = false,
  ) {
    this.#self = new Actor(place, place)
  }

  /** Carries a request out. It is rejected where the store refuses, or where it is not known whether it has. */
  ask<T>(from: Actor, work: () => T): Promise<T> {
    const serve = async () => {
      const { isRefusing, lateness } = this.trouble
      if (isRefusing) throw new ServiceError('STORAGE_FAILED', `${this.place} refuses`)
      if (lateness > 0) await this.world.sleep(this.world.random.fraction() * lateness, this.#self)
      return work()
    }
    return this.isLocal ? this.#askDisk(from, work) : this.world.call(from, this.#self, serve)
  }

  /** What a process was writing when it was killed may be there, or not. */
  #askDisk<T>(from: Actor, work: () => T): Promise<T> {
    const { isRefusing, lateness } = this.trouble
    const { random } = this.world
    return new Promise((resolve, reject) => {
      const carryOut = () => {
        if (isRefusing) return from.do(() => reject(new ServiceError('STORAGE_FAILED', `${this.place} refuses`)))
        /* c8 ignore next -- few schedules kill a process while it writes: nobody waits for the answer then */
        if (from.isDead && random.chance(0.5)) return
        const answer = work()
        from.do(() => resolve(answer))
      }
      this.world.after(1 + random.fraction() * Math.max(4, lateness), carryOut)
    })
  }
}

/** The log of the whole in a store with conditional writes, as all processes see it. */
export class LogStore extends Place {
  readonly entries: Entry[] = []
  readonly #monitor: Monitor
  /** A bug for the simulation to find: what is there is written over. */
  readonly #overwrites: boolean

  constructor(world: World, monitor: Monitor, { overwrites, isLocal }: { overwrites: boolean; isLocal: boolean }) {
    super(world, 'log', isLocal)
    this.#monitor = monitor
    this.#overwrites = overwrites
  }

  /** The log as a process reaches it. */
  of(actor: Actor): CommitLog {
    return {
      isDurable: true,
      put: async (entry) => {
        const stands = await this.ask(actor, () => this.#put(entry, actor))
        if (isSameEntry(stands, entry)) this.#monitor.believes(actor.name, entry)
        else this.#monitor.saw('lost puts')
        return stands
      },
      read: (position) => this.ask(actor, () => this.entries[position - 1]),
      newest: () => this.ask(actor, () => this.entries.at(-1)),
    }
  }

  #put(entry: Entry, by: Actor): Entry {
    const { position } = entry
    /* c8 ignore next -- a head writes behind what it has read */
    if (position > this.entries.length + 1) throw new RangeError(`entry ${position} would leave a gap`)
    if (position > this.entries.length || this.#overwrites) {
      this.entries[position - 1] = entry
      this.world.note(
        () => `log ${position}: ${entry.kind} step ${entry.step} generation ${entry.generation} by ${entry.head}`,
      )
      const isBack = entry.step < (this.entries[position - 2]?.step ?? 0)
      this.world.onMoment(isBack ? 'back' : entry.kind, by)
      if (isBack) this.#monitor.saw('went back')
      else if (entry.kind === 'begin' && position > 1) this.#monitor.saw('taken over')
    }
    return this.entries[position - 1] as Entry
  }
}

/** A step of a shard that is kept: the digest before it, and the variant of its gradients. */
export type KeptPoint = ShardPoint & { readonly previous: string; readonly variant: number }

const LEASE_MS = 10_000

/** The coordinator: who is alive, by leases, and the assignment, by compare-and-swap. */
export class Coordinator extends Place {
  assignment: Assignment | undefined
  readonly #leases = new Map<string, { room: Room; until: number }>()
  readonly #monitor: Monitor
  readonly #swapsBlindly: boolean

  constructor(world: World, monitor: Monitor, swapsBlindly: boolean) {
    super(world, 'coordinator')
    this.#monitor = monitor
    this.#swapsBlindly = swapsBlindly
  }

  /** Takes or renews the lease of the process at a place: that of an earlier life of it is gone. */
  renew(from: Actor, room: Room): Promise<readonly Room[]> {
    return this.ask(from, () => {
      this.#leases.set(from.place, { room, until: this.world.now + LEASE_MS })
      return [...this.#leases.values()].filter(({ until }) => until > this.world.now).map((lease) => lease.room)
    })
  }

  read(from: Actor): Promise<Assignment | undefined> {
    return this.ask(from, () => this.assignment)
  }

  /** Writes an assignment if the one before is of this generation. */
  swap(from: Actor, next: Assignment, before: number | undefined): Promise<boolean> {
    return this.ask(from, () => {
      if (this.assignment?.generation !== before && !this.#swapsBlindly) return false
      this.#monitor.assigned(this.assignment?.generation ?? 0, next.generation)
      this.assignment = next
      this.world.onMoment('assign', from)
      this.world.note(() => `generation ${next.generation}: ${next.shards.map(({ peer }) => peer).join(', ')}`)
      return true
    })
  }
}

/** What is kept of the shards, where every process reaches it: checkpoints, and each step with a journal. */
export class ShardStore extends Place {
  readonly #checkpoints = new Map<number, KeptPoint[]>()
  readonly #journal = new Map<number, KeptPoint[]>()

  /** The fraction of checkpoints that come to nothing: a disk was full, or a process too slow. */
  readonly #forgets: number

  constructor(world: World, { forgets, isLocal }: { forgets: number; isLocal: boolean }) {
    super(world, 'store', isLocal)
    this.#forgets = forgets
  }

  keepCheckpoint(from: Actor, shard: number, point: KeptPoint): Promise<void> {
    return this.ask(from, () => {
      if (this.world.random.chance(this.#forgets)) return
      add(this.#checkpoints, shard, point)
      this.world.onMoment('checkpoint', from)
    })
  }

  keepStep(from: Actor, shard: number, point: KeptPoint): Promise<void> {
    return this.ask(from, () => {
      add(this.#journal, shard, point)
      this.world.onMoment('journal', from)
    })
  }

  /** What came after a step is dropped. */
  drop(from: Actor, shard: number, step: number): Promise<void> {
    return this.ask(from, () => {
      const kept = this.#checkpoints.get(shard) ?? []
      this.#checkpoints.set(
        shard,
        kept.filter((point) => point.step <= step),
      )
    })
  }

  /** All points that a shard can be restored to. */
  read(from: Actor, shard: number): Promise<{ checkpoints: readonly KeptPoint[]; journal: readonly KeptPoint[] }> {
    return this.ask(from, () => {
      return { checkpoints: [...(this.#checkpoints.get(shard) ?? [])], journal: [...(this.#journal.get(shard) ?? [])] }
    })
  }
}

function add(kept: Map<number, KeptPoint[]>, shard: number, point: KeptPoint): void {
  const points = kept.get(shard) ?? []
  if (!points.some(({ digest }) => digest === point.digest)) points.push(point)
  kept.set(shard, points)
}
