import { Faults } from './faults.js'
import type { Seen } from './monitor.js'
import { CALM_MS, type Schedule } from './schedule.js'
import { CODE, NO_BUGS, Site, type Subject } from './site.js'
import { Trainer } from './trainer.js'

/** Once nothing goes wrong any more all is to come to its end in so many milliseconds of the simulated clock. */
const PATIENCE_MS = 180_000
/** `errors` are what the trainer was told, `violations` what must never be; milliseconds are of the world's clock. */
export type Outcome = {
  readonly violations: readonly string[]
  readonly errors: readonly string[]
  readonly milliseconds: number
  readonly seen: ReadonlyMap<Seen, number>
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
  new Faults(site, schedule.faults)
  world.after(CALM_MS, () => {
    world.weather = { ...world.weather, loss: 0, twice: 0 }
  })
  await world.run(CALM_MS + PATIENCE_MS, () => trainer.isDone || monitor.violations.length > 0)
  if (!trainer.isDone && monitor.violations.length === 0)
    monitor.violated(`the trainer has come to step ${trainer.step} of ${schedule.steps}, and no further`)
  monitor.conclude(log.entries)
  if (schedule.journal)
    for (const error of monitor.errors) monitor.violated(`with a journal the trainer was told: ${error}`)
  const { violations, errors, seen } = monitor
  return { violations, errors, seen, milliseconds: world.now, trace: world.trace ?? [] }
}
