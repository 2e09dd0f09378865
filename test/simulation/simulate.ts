import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { progressBar } from '../../examples/progress.js'
import { tableLines } from '../../src/text-table.js'
import { SEEN } from './monitor.js'
import { PLANTED, plant } from './mutants.js'
import { describe, type Schedule, scheduleOf } from './schedule.js'
import { shrink } from './shrink.js'
import { type Outcome, simulate } from './simulation.js'
import type { Subject } from './site.js'

const USAGE = `npm run simulate [-- --schedules N --first N --fixed | --seed N --fixed | --planted]

Plays a cluster in one process: heads, shards, stores and a trainer with a clock and a network of their own, in which everything goes wrong
that can. The code of src/cluster that places, votes, commits and recovers is the real one; processes, transport and stores are played.

--schedules N  so many schedules, each of another seed; default 10000
--first N      the seed of the first; default 0
--seed N       plays one schedule and prints what happens
--fixed        shards do not move: each waits until its process is back, with its disk
--planted      plants one bug after the other, and looks for the shortest schedule that finds it`

const { values: flags } = parseArgs({
  options: {
    schedules: { type: 'string', default: '10000' },
    first: { type: 'string', default: '0' },
    seed: { type: 'string' },
    planted: { type: 'boolean', default: false },
    fixed: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
})

if (flags.help) console.log(USAGE)
else if (flags.seed !== undefined) await playOne(whole(flags.seed))
else if (flags.planted) await findPlanted(whole(flags.schedules))
else await playAll(whole(flags.first), whole(flags.schedules))

function whole(text: string): number {
  const value = Number(text)
  if (Number.isSafeInteger(value) && value >= 0) return value
  throw new RangeError(`'${text}' is no whole number from 0 on`)
}

async function playOne(seed: number): Promise<void> {
  const schedule = scheduleOf(seed, !flags.fixed)
  const { trace, violations, errors } = await simulate(schedule, { isTraced: true })
  console.log(`${describe(schedule)}\n\n${trace.join('\n')}\n`)
  for (const error of errors) console.log(`the trainer was told: ${error}`)
  conclude(1, violations.length > 0 ? 1 : 0, violations)
}

type Played = { readonly schedule: Schedule; readonly outcome: Outcome }

async function playAll(first: number, count: number): Promise<void> {
  const bar = progressBar('simulate', count)
  const started = performance.now()
  const played: Played[] = []
  const failed: Schedule[] = []
  for (let i = 0; i < count; i += 1) {
    const schedule = scheduleOf(first + i, !flags.fixed)
    const outcome = await simulate(schedule)
    played.push({ schedule, outcome })
    if (outcome.violations.length > 0) failed.push(schedule)
    bar(i + 1, `${failed.length} failed`)
  }
  console.log(`${table(played)}\n\nseeds ${first} to ${first + count - 1}, ${seconds(performance.now() - started)} s`)
  for (const schedule of failed.slice(0, 3)) await explain(schedule)
  conclude(count, failed.length, [])
}

function conclude(count: number, failed: number, violations: readonly string[]): void {
  for (const violation of violations) console.log(`VIOLATED: ${violation}`)
  if (failed > 0) process.exitCode = 1
  console.log(`${count - failed} passed, ${failed} failed`)
}

/** A line for each number of shards and kind of durability. */
function table(played: readonly Played[]): string {
  const kinds = new Map<string, Played[]>()
  for (const one of played) {
    const { shards, journal } = one.schedule
    const key = `${String(shards).padStart(2)} ${journal ? 'journal' : 'checkpoints'}`
    kinds.set(key, [...(kinds.get(key) ?? []), one])
  }
  const rows = [...kinds].sort(([one], [other]) => one.localeCompare(other)).map(([key, of]) => row(key, of))
  const head = ['shards, kept by', 'schedules', 'faults', 'failed', 'told an error', ...SEEN, 'simulated hours']
  const all = row('all', played)
  const align = head.map((_, column) => (column === 0 ? 'left' : 'right') as 'left' | 'right')
  return tableLines({ head, align, rows: [...rows, all] }).join('\n')
}

function row(key: string, played: readonly Played[]): string[] {
  const sum = (of: (one: Played) => number) => played.reduce((total, one) => total + of(one), 0)
  const hours = sum(({ outcome }) => outcome.milliseconds) / 3_600_000
  const counts = [
    played.length,
    sum(({ schedule }) => schedule.faults.length),
    sum(({ outcome }) => Math.min(1, outcome.violations.length)),
    sum(({ outcome }) => Math.min(1, outcome.errors.length)),
    ...SEEN.map((what) => sum(({ outcome }) => outcome.seen.get(what) ?? 0)),
  ]
  return [key, ...counts.map(String), hours.toFixed(1)]
}

/** The shortest schedule that fails as this one does, and what happens in it. */
async function explain(failing: Schedule, subject?: Subject): Promise<void> {
  const fails = async (schedule: Schedule) => (await simulate(schedule, { subject })).violations.length > 0
  const shortest = await shrink(failing, fails)
  const { trace, violations } = await simulate(shortest, { subject, isTraced: true })
  console.log(`\nFAILED seed ${failing.seed}; the shortest schedule that fails:\n${describe(shortest)}`)
  console.log(`\n${trace.join('\n')}\n\n${violations.map((violation) => `VIOLATED: ${violation}`).join('\n')}`)
}

async function findPlanted(most: number): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'muond-planted-'))
  let missed = 0
  for (const [i, planted] of PLANTED.entries()) {
    const subject = await plant(planted, join(folder, String(i)))
    const started = performance.now()
    let seed = 0
    while (seed < most && (await simulate(scheduleOf(seed), { subject })).violations.length === 0) seed += 1
    console.log(
      `\n== ${planted.name}: ${seed < most ? `found with seed ${seed}` : 'NOT FOUND'}, ${seconds(performance.now() - started)} s`,
    )
    if (seed < most) await explain(scheduleOf(seed), subject)
    else missed += 1
  }
  rmSync(folder, { recursive: true })
  conclude(PLANTED.length, missed, [])
}

function seconds(milliseconds: number): string {
  return (milliseconds / 1000).toFixed(1)
}
