import { setImmediate as turn } from 'node:timers/promises'
import { Random } from './random.js'

/** Somebody whose work is events of the world: the life of a process from its start to its kill, or a trainer. */
export class Actor {
  isDead = false
  #held: (() => void)[] | undefined

  constructor(
    readonly place: string,
    readonly name: string,
  ) {}

  /** What comes while it is stopped it does when it goes on, in order. */
  stop(): void {
    this.#held ??= []
  }

  goOn(): void {
    const held = this.#held ?? []
    this.#held = undefined
    for (const work of held) this.do(work)
  }

  do(work: () => void): void {
    if (this.isDead) return
    if (this.#held) this.#held.push(work)
    else work()
  }
}

type Event = { readonly at: number; readonly order: number; readonly work: () => void }

/** Milliseconds that a message is under way, the fraction of them that are lost, and of those that come twice. */
export type Weather = { readonly delay: number; readonly loss: number; readonly twice: number }

/** A time at which the places on one side cannot reach those on the other, in one direction or both. */
type Cut = { readonly side: ReadonlySet<string>; readonly isOneWay: boolean }

/** So many of the messages take so long at most: longer than anybody waits for an answer. */
const DETOURS = 0.01
const DETOUR_MS = 10_000

export class TimeoutError extends Error {}

/** What a fault can wait for: something is written. `back` is a beginning that goes back to an earlier step. */
export type Moment = 'assign' | 'begin' | 'back' | 'commit' | 'journal' | 'checkpoint'

/** The clock and the network. Only what is an event here happens, in an order that the seed decides. */
export class World {
  now = 0
  readonly random: Random
  readonly trace: string[] | undefined
  readonly cuts = new Set<Cut>()
  weather: Weather
  /** Told of each moment, with the actor whose doing it is, before that one knows of it itself. */
  onMoment!: (moment: Moment, by: Actor) => void
  #order = 0
  readonly #events: Event[] = []

  constructor(seed: number, { weather, isTraced }: { weather: Weather; isTraced: boolean }) {
    this.random = new Random(seed)
    this.weather = weather
    this.trace = isTraced ? [] : undefined
  }

  note(text: () => string): void {
    this.trace?.push(`${(this.now / 1000).toFixed(3).padStart(8)} s  ${text()}`)
  }

  after(delay: number, work: () => void, actor?: Actor): void {
    push(this.#events, { at: this.now + delay, order: this.#order++, work: actor ? () => actor.do(work) : work })
  }

  sleep(delay: number, actor: Actor): Promise<void> {
    return new Promise((resolve) => this.after(delay, resolve, actor))
  }

  /** Lets things happen until `isOver`, or up to `end`. Something is always left to happen: leases are renewed. */
  async run(end: number, isOver: () => boolean): Promise<void> {
    while (!isOver()) {
      const event = pop(this.#events)
      if (event.at > end) return
      this.now = event.at
      event.work()
      // What waits for a promise goes on in this turn, and before the next event.
      await turn()
    }
  }

  /**
   * Sends a request and resolves to its answer. Either may be late, lost or come twice; then, and where a process at
   * the other end is dead, stopped or cut off, it is rejected with TimeoutError, though the request may have been
   * carried out, or still be.
   */
  call<T>(from: Actor, to: Actor, serve: () => Promise<T>, patience = 2000): Promise<T> {
    return new Promise((resolve, reject) => {
      this.after(patience, () => reject(new TimeoutError(`${to.name} does not answer ${from.name}`)), from)
      const answer = (settle: () => void) => this.#send([to.place, from.place], () => from.do(settle))
      const receive = () =>
        void serve().then(
          (value) => answer(() => resolve(value)),
          (error: unknown) => answer(() => reject(error)),
        )
      this.#send([from.place, to.place], () => to.do(receive))
    })
  }

  #send(way: readonly [string, string], work: () => void): void {
    const { delay, loss, twice } = this.weather
    const copies = this.random.chance(twice) ? 2 : 1
    for (let i = 0; i < copies; i += 1) {
      if (this.random.chance(loss)) continue
      const most = this.random.chance(DETOURS) ? DETOUR_MS : delay
      this.after(1 + this.random.fraction() * most, () => {
        if (!this.#isCut(way)) work()
      })
    }
  }

  #isCut([from, to]: readonly [string, string]): boolean {
    return [...this.cuts].some(({ side, isOneWay }) => {
      return side.has(from) !== side.has(to) && (!isOneWay || side.has(from))
    })
  }
}

const isBefore = (one: Event, other: Event) => one.at < other.at || (one.at === other.at && one.order < other.order)

/** Adds to a binary heap, the earliest event first. */
function push(heap: Event[], event: Event): void {
  let at = heap.length
  heap.push(event)
  while (at > 0) {
    const parent = (at - 1) >> 1
    if (!isBefore(event, heap[parent]!)) break
    heap[at] = heap[parent]!
    at = parent
  }
  heap[at] = event
}

/** Takes the earliest event off a heap that has one. */
function pop(heap: Event[]): Event {
  const first = heap[0]!
  const last = heap.pop()!
  /* c8 ignore next -- something is always left to happen */
  if (heap.length === 0) return first
  let at = 0
  for (;;) {
    let child = 2 * at + 1
    if (child >= heap.length) break
    if (child + 1 < heap.length && isBefore(heap[child + 1]!, heap[child]!)) child += 1
    if (!isBefore(heap[child]!, last)) break
    heap[at] = heap[child]!
    at = child
  }
  heap[at] = last
  return first
}
