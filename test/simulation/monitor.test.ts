import t from 'tap'
import type { Entry } from '../../src/cluster/commit-log.js'
import { FIRST_DIGEST } from '../../src/run/digest.js'
import { digestAfter, Monitor } from './monitor.js'

const PARAMETERS = [[0, 2], [1]]
const BEGIN: Entry = {
  ...{ position: 1, kind: 'begin', generation: 1, head: 'a', step: 0 },
  ...{ digest: FIRST_DIGEST, shards: [FIRST_DIGEST, FIRST_DIGEST] },
}

function after({ position, step, digest, shards, ...rest }: Entry, variants: readonly number[] = [0, 0]): Entry {
  const next = step + 1
  const own = shards.map((previous, i) => digestAfter(PARAMETERS[i]!, { previous, step: next, variant: variants[i]! }))
  const whole = digestAfter([0, 1, 2], { previous: digest, step: next, variant: variants[0]! })
  return { ...rest, position: position + 1, kind: 'commit', step: next, digest: whole, shards: own }
}

/** A monitor of a cluster whose shards have finished what their head commits. */
function watch(entries: readonly Entry[], journal = true): Monitor {
  const monitor = new Monitor(journal, PARAMETERS)
  for (const entry of entries) {
    for (const [shard, digest] of entry.shards.entries())
      monitor.finished(entry.generation, shard, { step: entry.step, digest })
    monitor.believes(entry.head, entry)
  }
  return monitor
}

const FIRST = after(BEGIN)
const again = (entry: Entry, changes: Partial<Entry>): Entry => ({ ...entry, position: entry.position + 1, ...changes })
const TAKEN = again(FIRST, { kind: 'begin', generation: 2, head: 'b' })

t.test('nothing is wrong with a log that a head has written and another gone on with', async (t) => {
  const log = [BEGIN, FIRST, TAKEN, after(TAKEN)]
  const monitor = watch(log)
  monitor.received(1, FIRST.digest)
  monitor.received(1, FIRST.digest)
  monitor.conclude(log)
  t.same(monitor.violations, [])
})

t.test('what must never be is noted', async (t) => {
  const wrong = (log: readonly Entry[], believed: readonly Entry[] = log, journal = true) => {
    const monitor = watch(believed, journal)
    monitor.conclude(log)
    return monitor.violations
  }
  const other = { ...FIRST, head: 'b', generation: 2 }
  t.match(wrong([BEGIN, other], [BEGIN, FIRST]), [/a has committed step 1 at 2, where the log has b's step 1/])
  t.match(wrong([BEGIN], [BEGIN, FIRST]), [/where the log has undefined's/])
  t.match(wrong([BEGIN, other]), [/entry 2, commit of step 1 in generation 2, comes after step 0 of a/])
  t.match(wrong([BEGIN, FIRST, again(FIRST, {})]), [/comes after step 1 of a/, /has digest/])
  t.match(wrong([BEGIN, FIRST, again(TAKEN, { position: 3, generation: 0 })]), [/comes after generation 1/])
  t.match(wrong([BEGIN, FIRST, again(TAKEN, { position: 3, step: 2 })]), [/begin of step 2 .* comes after step 1/])
  const back = again(BEGIN, { position: 3, generation: 2 })
  t.match(wrong([BEGIN, FIRST, back]), [/begin of step 0 .* comes after step 1/])
  t.same(wrong([BEGIN, FIRST, back], [BEGIN, FIRST], false), [], 'without a journal it may go back')
  t.match(wrong([BEGIN, { ...FIRST, digest: 'another' }]), [/entry 2, .* has digest another/])
})

t.test(
  'a commit without one of its shards, generations that do not grow, receipts that differ or are lost',
  async (t) => {
    const monitor = new Monitor(true, PARAMETERS)
    monitor.finished(1, 0, { step: 1, digest: FIRST.shards[0]! })
    monitor.believes('a', FIRST)
    monitor.assigned(2, 2)
    for (const generation of [1, 2, 2, 1]) monitor.told(generation)
    monitor.received(1, FIRST.digest)
    monitor.received(1, 'another')
    monitor.received(2, 'never')
    t.match(monitor.violations, [
      /step 1 is committed by a in generation 1, but shard 1 has not finished it/,
      /generation 2 is assigned after generation 2/,
      /told generation 1 after 2/,
      /two receipts of step 1/,
    ])
    monitor.conclude([BEGIN, FIRST])
    t.match(monitor.violations.slice(4), [/step 1 was acknowledged, and the log does not have it/, /step 2 was/])
    monitor.wentBack(0)
    const { length } = monitor.violations
    monitor.conclude([BEGIN, FIRST])
    t.equal(monitor.violations.length, length)
  },
)
