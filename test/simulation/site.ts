import { placeShards } from '../../src/cluster/placement.js'
import { recoveryOf } from '../../src/cluster/recovery.js'
import { Whole } from '../../src/cluster/whole.js'
import { type Model, modelOf } from '../cluster/models.js'
import { Monitor } from './monitor.js'
import { SimulatedProcess } from './process.js'
import type { Schedule } from './schedule.js'
import { Coordinator, LogStore, ShardStore } from './stores.js'
import { type Actor, TimeoutError, World } from './world.js'

/** The code that is put to the test; a test of the simulation itself has other code there. */
export type Code = { readonly Whole: Pick<typeof Whole, 'begin'>; readonly recoveryOf: typeof recoveryOf }

/** Bugs of what lies around that code. */
export type Bugs = Readonly<Record<'overwrites' | 'swapsBlindly' | 'votesEarly' | 'opensAgain', boolean>>

export const CODE: Code = { Whole, recoveryOf }
export const NO_BUGS: Bugs = { overwrites: false, swapsBlindly: false, votesEarly: false, opensAgain: false }

export type Subject = { readonly code: Code; readonly bugs: Bugs }

/** All that processes and trainers of one simulation share: the world, the stores, the model, and who is where. */
export class Site {
  readonly world: World
  readonly monitor: Monitor
  readonly log: LogStore
  readonly coordinator: Coordinator
  readonly store: ShardStore
  readonly journal: boolean
  readonly moves: boolean
  readonly model: Model
  /** The parameters of each shard. */
  readonly parameters: readonly (readonly number[])[]
  /** Where processes are, whether they live or not. */
  readonly places: readonly string[]
  readonly code: Code
  readonly bugs: Bugs
  readonly #processes: SimulatedProcess[] = []
  readonly #lives: number[] = []

  constructor(schedule: Schedule, { code, bugs }: Subject, isTraced: boolean) {
    const { seed, weather, shards, journal, moves, processes, forgets } = schedule
    const isLocal = !moves
    const { model, parameters } = modelFor(shards)
    this.world = new World(seed, { weather, isTraced })
    this.monitor = new Monitor(journal, parameters)
    this.log = new LogStore(this.world, this.monitor, { overwrites: bugs.overwrites, isLocal })
    this.coordinator = new Coordinator(this.world, this.monitor, bugs.swapsBlindly)
    this.store = new ShardStore(this.world, { forgets, isLocal })
    this.journal = journal
    this.moves = moves
    this.places = Array.from({ length: processes }, (_, i) => placeOf(i))
    this.model = model
    this.parameters = parameters
    this.code = code
    this.bugs = bugs
    for (let i = 0; i < processes; i += 1) {
      this.#processes.push(new SimulatedProcess(this, placeOf(i), 1))
      this.#lives.push(1)
    }
  }

  /** The newest life of each process. */
  get processes(): readonly SimulatedProcess[] {
    return this.#processes
  }

  /** Kills a process and starts it again, with nothing in memory; it takes `delay` milliseconds to be back. */
  restart(index: number, delay: number): void {
    this.#processes[index]!.actor.isDead = true
    const life = ++this.#lives[index]!
    this.world.after(delay, () => {
      // It may have been killed again before it was back.
      if (this.#lives[index] === life) this.#processes[index] = new SimulatedProcess(this, placeOf(index), life)
    })
  }

  /**
   * Asks a process by its address, a few times if it does not answer: all that is asked may be asked again. At the
   * address of an earlier life nobody answers.
   */
  async call<T>(from: Actor, url: string | undefined, ask: (process: SimulatedProcess) => Promise<T>): Promise<T> {
    for (let attempt = 1; ; attempt += 1) {
      const process = this.#processes.find((one) => one.url === url && !one.actor.isDead)
      try {
        if (process) return await this.world.call(from, process.actor, async () => ask(process))
        await this.world.sleep(50, from)
        throw new TimeoutError(`nobody is at ${url}`)
      } catch (error) {
        if (attempt === ATTEMPTS || !process || !(error instanceof TimeoutError)) throw error
      }
    }
  }
}

export const placeOf = (index: number) => `p${index}`

const ATTEMPTS = 3

const models = new Map<number, { model: Model; parameters: readonly (readonly number[])[] }>()

/** A model of two parameters and a few more for each shard. */
function modelFor(shards: number) {
  const known = models.get(shards)
  if (known) return known
  const declared = Array.from({ length: 2 * shards + 1 }, (_, i) => ({ name: `p${i}`, shape: [1 + i], group: 'adamw' }))
  const model = modelOf('simulated', declared)
  const made = { model, parameters: placeShards(model.parameters, [], shards) }
  models.set(shards, made)
  return made
}
