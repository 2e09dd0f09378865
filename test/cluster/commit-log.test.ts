import fc from 'fast-check'
import t from 'tap'
import { type Entry, findStep, MemoryLog } from '../../src/cluster/commit-log.js'

/** What a head does next: it commits, or begins, where a number says so that many steps back. */
const act = fc.oneof(
  { weight: 4, arbitrary: fc.constant('commit' as const) },
  { weight: 1, arbitrary: fc.nat({ max: 6 }) },
)

t.test('the entry of a step is the last one of it, and few entries are read to find it', async (t) => {
  await fc.assert(
    fc.asyncProperty(fc.array(act, { maxLength: 60 }), fc.nat({ max: 3 }), async (acts, start) => {
      const log = new MemoryLog()
      const entries: Entry[] = []
      let step = start
      const put = async (kind: Entry['kind']) => {
        const position = entries.length + 1
        const entry = { position, kind, generation: 1, head: 'h', step, digest: `${position}`, shards: [] }
        entries.push(await log.put(entry))
      }
      await put('begin')
      for (const one of acts) {
        step = one === 'commit' ? step + 1 : Math.max(start, step - one)
        await put(one === 'commit' ? one : 'begin')
      }
      let reads = 0
      const counted = Object.assign(new MemoryLog(), {
        read: (position: number) => {
          reads += 1
          return log.read(position)
        },
      })
      const begins = entries.filter(({ kind }) => kind === 'begin').length
      for (let wanted = 0; wanted <= step + 2; wanted++) {
        reads = 0
        const expected = wanted > step ? undefined : entries.findLast((entry) => entry.step === wanted)
        t.equal(await findStep(counted, entries.at(-1)!, wanted), expected)
        t.ok(reads <= begins + 1, `${reads} reads of a log with ${begins} beginnings`)
      }
    }),
    { numRuns: 60, seed: 5 },
  )
})
