import t from 'tap'
import { MemoryLog } from '../../src/cluster/commit-log.js'
import { recoveryOf, type ShardState } from '../../src/cluster/recovery.js'
import { Whole } from '../../src/cluster/whole.js'
import { FIRST_DIGEST } from '../../src/run/digest.js'
import { receiptOf, recordOf } from './records.js'

/** A whole of two shards at step 4 that another head takes over, and the digests of each shard after each step. */
async function takenOver() {
  const log = new MemoryLog()
  const shards = [0, 1].map((index) => ({ peer: `http://peer-${index}`, parameters: [index] }))
  const begin = (generation: number) =>
    Whole.begin({ log, assignment: { run: 'gpt', generation, shards }, attentions: [], head: `head ${generation}` })
  const whole = await begin(1)
  const digests = [[FIRST_DIGEST], [FIRST_DIGEST]]
  for (const step of [1, 2, 3, 4]) {
    for (const [shard, own] of digests.entries()) {
      const records = [recordOf(shard, step)]
      const receipt = receiptOf(step, { digest: own.at(-1)!, records })
      whole.vote({ generation: 1, shard, step, records, receipt })
      own.push(receipt.digest)
    }
    await whole.ended(step)
  }
  /** Where a shard is after a step, and what it can go back to. */
  const at = (shard: number, step: number, kept: readonly number[] = []): ShardState => {
    const own = [...digests[shard]!, 'one ahead']
    const checkpoints = kept.map((step) => ({ step, digest: own[step]! }))
    return { step, digest: own[step]!, previous: own[step - 1] ?? '', checkpoints }
  }
  return { whole: await begin(2), at }
}

t.test('the last committed step, where every shard is there or one ahead', async (t) => {
  const { whole, at } = await takenOver()
  t.same(await recoveryOf(whole, [at(0, 4), at(1, 4)]), { step: 4, back: [] })
  t.same(await recoveryOf(whole, [at(0, 5), at(1, 4, [4])]), { step: 4, back: [] })
  t.same(await recoveryOf(whole, [at(0, 5, [1, 4]), at(1, 5, [5])]), { step: 4, back: [0] }, 'back if it can')
})

t.test('else the newest step of which every shard has a checkpoint', async (t) => {
  const { whole, at } = await takenOver()
  t.same(await recoveryOf(whole, [at(0, 3, [1, 2, 3]), at(1, 4, [0, 1, 3])]), { step: 3, back: [1] })
  t.same(await recoveryOf(whole, [at(0, 3, [1, 2, 3]), at(1, 4, [0, 1])]), { step: 1, back: [0, 1] })
  t.same(await recoveryOf(whole, [at(0, 0, [0]), at(1, 5, [0, 5])]), { step: 0, back: [1] })
})

t.test('else nothing', async (t) => {
  const { whole, at } = await takenOver()
  t.equal(await recoveryOf(whole, [at(0, 3, [3]), at(1, 4, [2])]), undefined)
  t.equal(await recoveryOf(whole, [at(0, 3), at(1, 4, [3])]), undefined)
})

t.test('state with another digest counts for nothing', async (t) => {
  const { whole, at } = await takenOver()
  const other = { digest: 'another', previous: 'another' }
  t.same(await recoveryOf(whole, [{ ...at(0, 4, [2]), ...other }, at(1, 4, [2, 3])]), { step: 2, back: [0, 1] })
  t.same(await recoveryOf(whole, [{ ...at(0, 5, [2]), ...other }, at(1, 4, [2])]), { step: 2, back: [0, 1] })
  const checkpoints = [{ step: 3, digest: 'another' }, ...at(0, 4, [1]).checkpoints]
  t.same(await recoveryOf(whole, [{ ...at(0, 3), checkpoints }, at(1, 4, [1, 3])]), { step: 1, back: [0, 1] })
})
