import type { Fault, Schedule } from './schedule.js'

/**
 * A schedule that still `fails` and of which nothing can be left out: less of it at a time is tried as long as one of
 * those fails, too.
 */
export async function shrink(failing: Schedule, fails: (schedule: Schedule) => Promise<boolean>): Promise<Schedule> {
  let shortest = failing
  let candidates = simpler(shortest)
  for (;;) {
    const { value } = candidates.next()
    if (!value) return shortest
    if (!(await fails(value))) continue
    shortest = value
    candidates = simpler(shortest)
  }
}

/** Schedules that are a little simpler, those that are simpler by much first. */
function* simpler(schedule: Schedule): Generator<Schedule, undefined> {
  const { faults, processes, shards, steps, weather } = schedule
  if (faults.length > 1) {
    const half = faults.length >> 1
    yield { ...schedule, faults: faults.slice(0, half) }
    yield { ...schedule, faults: faults.slice(half) }
  }
  for (const i of faults.keys()) yield { ...schedule, faults: faults.filter((_, other) => other !== i) }
  if (weather.loss > 0) yield { ...schedule, weather: { ...weather, loss: 0 } }
  if (weather.twice > 0) yield { ...schedule, weather: { ...weather, twice: 0 } }
  for (const fewer of fewerThan(shards)) yield { ...schedule, shards: fewer }
  for (const fewer of fewerThan(processes))
    yield { ...schedule, processes: fewer, faults: faults.filter((fault) => isAmong(fault, fewer)) }
  for (const fewer of fewerThan(steps)) yield { ...schedule, steps: fewer }
  return undefined
}

/** Half as many, and one less. */
function fewerThan(count: number): number[] {
  return [...new Set([count >> 1, count - 1])].filter((fewer) => fewer > 0)
}

/** Whether a fault hits one of so many processes, if it names one. */
function isAmong(fault: Fault, processes: number): boolean {
  return !('process' in fault) || fault.process < processes
}
