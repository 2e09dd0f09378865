import t from 'tap'
import { MemoryLog } from '../../src/cluster/commit-log.js'
import { type ShardState, stepToGoOnAfter } from '../../src/cluster/recovery.js'
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
  t.equal(await stepToGoOnAfter(whole, [at(0, 4), at(1, 4)]), 4)
  t.equal(await stepToGoOnAfter(whole, [at(0, 5), at(1, 4)]), 4)
})

t.test('else the newest step of which every shard has a checkpoint', async (t) => {
  const { whole, at } = await takenOver()
  t.equal(await stepToGoOnAfter(whole, [at(0, 3, [1, 2, 3]), at(1, 4, [0, 1, 3])]), 3)
  t.equal(await stepToGoOnAfter(whole, [at(0, 3, [1, 2, 3]), at(1, 4, [0, 1])]), 1)
  t.equal(await stepToGoOnAfter(whole, [at(0, 0, [0]), at(1, 5, [0, 5])]), 0)
})

t.test('else nothing', async (t) => {
  const { whole, at } = await takenOver()
  t.equal(await stepToGoOnAfter(whole, [at(0, 3, [3]), at(1, 4, [2])]), undefined)
  t.equal(await stepToGoOnAfter(whole, [at(0, 3), at(1, 4, [3])]), undefined)
})

t.test('state with another digest counts for nothing', async (t) => {
  const { whole, at } = await takenOver()
  const other = { digest: 'another', previous: 'another' }
  t.equal(await stepToGoOnAfter(whole, [{ ...at(0, 4, [2]), ...other }, at(1, 4, [2, 3])]), 2)
  t.equal(await stepToGoOnAfter(whole, [{ ...at(0, 5, [2]), ...other }, at(1, 4, [2])]), 2)
  const elsewhere = [{ step: 3, digest: 'another' }, ...at(0, 4, [1]).checkpoints]
  t.equal(await stepToGoOnAfter(whole, [{ ...at(0, 3), checkpoints: elsewhere }, at(1, 4, [1, 3])]), 1)
})
