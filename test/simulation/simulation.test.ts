import { join } from 'node:path'
import t from 'tap'
import { PLANTED, plant } from './mutants.js'
import { describe, type Schedule, scheduleOf } from './schedule.js'
import { shrink } from './shrink.js'
import { simulate } from './simulation.js'

// A quick round: `npm run simulate` plays 10,000 schedules.
const SCHEDULES = 40
/** From the seed on that has found a planted bug so many are tried. */
const TRIED = 1500

t.test('no schedule has two commits of a step, loses an acknowledged one, or comes to no end', async (t) => {
  const large = Array.from({ length: 400 }, (_, seed) => scheduleOf(seed)).find(({ shards }) => shards === 64)
  const schedules = [...Array.from({ length: SCHEDULES }, (_, seed) => scheduleOf(seed)), large!]
  const seen = new Map<string, number>()
  for (const schedule of schedules) {
    const outcome = await simulate(schedule)
    if (outcome.violations.length > 0) t.fail(`${describe(schedule)}\n${outcome.violations.join('\n')}`)
    for (const [what, count] of outcome.seen) seen.set(what, (seen.get(what) ?? 0) + count)
  }
  for (const [what, count] of seen) t.ok(count > 0, `${what}: the schedules bring it about, ${count} times`)
})

t.test('nor does one whose shards wait for their processes', async (t) => {
  const seen = { errors: 0, beginnings: 0 }
  for (let seed = 0; seed < SCHEDULES; seed += 1) {
    const schedule = scheduleOf(seed, false)
    const outcome = await simulate(schedule)
    if (outcome.violations.length > 0) t.fail(`${describe(schedule)}\n${outcome.violations.join('\n')}`)
    seen.errors += outcome.errors.length
    seen.beginnings += outcome.seen.get('taken over')!
  }
  t.ok(seen.errors > 0 && seen.beginnings > 0, 'heads are started again, and shards lose their last steps')
})

t.test('equal schedules come to equal ends', async (t) => {
  const [one, two] = [
    await simulate(scheduleOf(5), { isTraced: true }),
    await simulate(scheduleOf(5), { isTraced: true }),
  ]
  t.same(one, two)
  t.ok(one.trace.length > 10)
})

for (const [i, planted] of PLANTED.entries()) {
  t.test(`found: ${planted.name}`, async (t) => {
    const subject = await plant(planted, join(t.testdir(), String(i)))
    let seed = planted.seed
    const isFound = async () => (await simulate(scheduleOf(seed), { subject })).violations.length > 0
    while (seed < planted.seed + TRIED && !(await isFound())) seed += 1
    t.ok(seed < planted.seed + TRIED, `with seed ${seed}`)
  })
}

t.test('a bug that cannot be planted any more is told', async (t) => {
  const planted = { name: 'gone', seed: 0, bug: { file: 'whole', from: 'no such line', to: '' } } as const
  await t.rejects(plant(planted, t.testdir()), { message: /whole.js does not have 'no such line'/ })
})

t.test('a schedule that fails is shortened, and each fault of it is said', async (t) => {
  const planted = PLANTED.find(({ name }) => name === 'the generation of a vote is not compared')!
  const subject = await plant(planted, t.testdir())
  const fails = async (schedule: Schedule) => (await simulate(schedule, { subject })).violations.length > 0
  const failing = scheduleOf(planted.seed)
  const shortest = await shrink(failing, fails)
  t.ok(await fails(shortest))
  t.ok(shortest.faults.length < failing.faults.length && shortest.steps < failing.steps, describe(shortest))
  t.same(await shrink(shortest, fails), shortest, 'nothing can be left out of it')
})

t.test('a schedule is said in a line for each fault, in the order in which they come', async (t) => {
  const when = { at: 2500, lasts: 300 }
  const faults: Schedule['faults'] = [
    { ...when, at: 9000, kind: 'kill', process: 1 },
    { ...when, kind: 'stop', process: 0 },
    { ...when, kind: 'strike', how: 'stop', moment: 'back' },
    { ...when, kind: 'cut', side: ['p0', 'log'], isOneWay: true },
    { ...when, kind: 'cut', side: ['p1'], isOneWay: false },
    { ...when, kind: 'refuse', store: 'log' },
    { ...when, kind: 'late', store: 'store' },
  ]
  t.equal(
    describe({ ...scheduleOf(1, false), journal: false, forgets: 0.1, faults })
      .split('\n')
      .slice(2)
      .join('\n'),
    `   2.500 s  for 0.300 s: stop p0
   2.500 s  for 0.300 s: stop whoever has come to the next 'back'
   2.500 s  for 0.300 s: cut p0, log off, in one direction
   2.500 s  for 0.300 s: cut p1 off
   2.500 s  for 0.300 s: log refuses
   2.500 s  for 0.300 s: store is late
   9.000 s  for 0.300 s: kill p1`,
  )
})
