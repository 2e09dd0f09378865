import { CALM_MS, type Fault, type Schedule } from './schedule.js'
import { CODE, NO_BUGS, Site, type Subject } from './site.js'
import { Trainer } from './trainer.js'

/** Once nothing goes wrong any more all is to come to its end in so many milliseconds of the simulated clock. */
const PATIENCE_MS = 180_000
/** How late a store is at most that is late: longer than a lease, and than anybody waits for an answer. */
const LATENESS_MS = 20_000

/** `errors` are what the trainer was told; `violations` what must never be. */
export type Outcome = {
  readonly violations: readonly string[]
  readonly errors: readonly string[]
  readonly milliseconds: number
  readonly generations: number
  readonly wentBack: number
  readonly trace: readonly string[]
}

/** Plays a schedule to its end: equal schedules come to equal outcomes. */
export async function simulate(
  schedule: Schedule,
  { subject = { code: CODE, bugs: NO_BUGS }, isTraced = false }: { subject?: Subject; isTraced?: boolean } = {},
): Promise<Outcome> {
  const site = new Site(schedule, subject, isTraced)
  const { world, monitor, log } = site
  const trainer = new Trainer(site, schedule.steps)
  for (const fault of schedule.faults) world.after(fault.at, () => begin(site, fault))
  world.after(CALM_MS, () => {
    world.weather = { ...world.weather, loss: 0, twice: 0 }
  })
  await world.run(CALM_MS + PATIENCE_MS, () => trainer.isDone || monitor.violations.length > 0)
  if (!trainer.isDone && monitor.violations.length === 0)
    monitor.violated(`the trainer has come to step ${trainer.step} of ${schedule.steps}, and no further`)
  monitor.conclude(log.entries)
  if (schedule.journal)
    for (const error of monitor.errors) monitor.violated(`with a journal the trainer was told: ${error}`)
  const { violations, errors } = monitor
  const generations = log.entries.at(-1)?.generation ?? 0
  const wentBack = log.entries.filter(({ step }, i) => step < (log.entries[i - 1]?.step ?? 0)).length
  return { violations, errors, milliseconds: world.now, generations, wentBack, trace: world.trace ?? [] }
}

/** A fault begins, and ends after its time. */
function begin(site: Site, fault: Fault): void {
  const { world } = site
  world.note(() => `${fault.kind} begins`)
  const end = beginning(site, fault)
  world.after(fault.lasts, () => {
    world.note(() => `${fault.kind} ends`)
    end()
  })
}

function beginning(site: Site, fault: Fault): () => void {
  switch (fault.kind) {
    case 'kill':
      site.restart(fault.process, fault.lasts)
      return () => undefined
    case 'stop': {
      const { actor } = site.processes[fault.process]!
      actor.stop()
      return () => actor.goOn()
    }
    case 'cut': {
      const cut = { side: new Set(fault.side), isOneWay: fault.isOneWay }
      site.world.cuts.add(cut)
      return () => void site.world.cuts.delete(cut)
    }
    default: {
      const { trouble } = site[fault.store]
      if (fault.kind === 'refuse') trouble.isRefusing = true
      else trouble.lateness = LATENESS_MS
      return () => Object.assign(trouble, fault.kind === 'refuse' ? { isRefusing: false } : { lateness: 0 })
    }
  }
}
