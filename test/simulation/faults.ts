import { CALM_MS, type Fault } from './schedule.js'
import type { Site } from './site.js'
import type { Actor, Moment } from './world.js'

/** How late a store is at most that is late: longer than a lease, and than anybody waits for an answer. */
const LATENESS_MS = 20_000

type Strike = Extract<Fault, { kind: 'strike' }>

/** Has what goes wrong in a schedule go wrong. */
export class Faults {
  readonly #site: Site
  /** Strikes whose moment has not come. */
  readonly #strikes: Strike[] = []

  constructor(site: Site, faults: readonly Fault[]) {
    this.#site = site
    site.world.onMoment = (moment, by) => this.#strike(moment, by)
    site.world.after(CALM_MS, () => this.#strikes.splice(0))
    for (const fault of faults) site.world.after(fault.at, () => this.#begin(fault))
  }

  #begin(fault: Fault): void {
    const { world } = this.#site
    switch (fault.kind) {
      case 'kill':
        return this.#kill(fault.process, fault.lasts)
      case 'stop':
        return this.#stop(this.#site.processes[fault.process]!.actor, fault.lasts)
      case 'strike':
        this.#strikes.push(fault)
        return
      case 'cut': {
        const cut = { side: new Set(fault.side), isOneWay: fault.isOneWay }
        world.note(() => `${fault.side} are cut off for ${fault.lasts} ms`)
        world.cuts.add(cut)
        return world.after(fault.lasts, () => world.cuts.delete(cut))
      }
      default: {
        const { trouble } = this.#site[fault.store]
        const [now, then] =
          fault.kind === 'late'
            ? [{ lateness: LATENESS_MS }, { lateness: 0 }]
            : [{ isRefusing: true }, { isRefusing: false }]
        world.note(() => `${fault.store} ${fault.kind}s for ${fault.lasts} ms`)
        Object.assign(trouble, now)
        return world.after(fault.lasts, () => Object.assign(trouble, then))
      }
    }
  }

  #strike(moment: Moment, by: Actor): void {
    const at = this.#strikes.findIndex((strike) => strike.moment === moment)
    const [strike] = at < 0 ? [] : this.#strikes.splice(at, 1)
    if (!strike) return
    if (strike.how === 'stop') return this.#stop(by, strike.lasts)
    const index = this.#site.processes.findIndex(({ actor }) => actor === by)
    if (index >= 0) this.#kill(index, strike.lasts)
  }

  #kill(index: number, lasts: number): void {
    this.#site.world.note(() => `p${index} is killed for ${lasts} ms`)
    this.#site.restart(index, lasts)
  }

  #stop(actor: Actor, lasts: number): void {
    const { world } = this.#site
    world.note(() => `${actor.name} is stopped for ${lasts} ms`)
    actor.stop()
    world.after(lasts, () => actor.goOn())
  }
}
