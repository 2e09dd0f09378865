import fc from 'fast-check'
import t, { type Test } from 'tap'
import type { Assignment } from '../../src/cluster/assignment.js'
import { type Entry, MemoryLog } from '../../src/cluster/commit-log.js'
import type { Vote, VotedRecord } from '../../src/cluster/vote.js'
import { Whole } from '../../src/cluster/whole.js'
import { ServiceError } from '../../src/errors.js'
import { FIRST_DIGEST } from '../../src/run/digest.js'
import type { ReceiptFrame } from '../../src/wire/frame.js'
import { receiptOf, recordOf } from './records.js'

const assignmentOf = (parameters: readonly (readonly number[])[], generation = 1): Assignment => {
  return { run: 'gpt', generation, shards: parameters.map((own, i) => ({ peer: `http://peer-${i}`, parameters: own })) }
}
const HALVES = [
  [0, 3],
  [1, 2],
]

/** The shards of a whole, which vote as real ones do. */
class Shards {
  readonly digests: string[]

  constructor(readonly parameters: readonly (readonly number[])[]) {
    this.digests = parameters.map(() => FIRST_DIGEST)
  }

  vote(shard: number, step: number, { generation = 1, variant = 0 } = {}): Vote {
    const records = this.parameters[shard]!.map((index) => recordOf(index, step, variant))
    const receipt = receiptOf(step, { digest: this.digests[shard]!, records })
    return { generation, shard, step, records, receipt }
  }

  /** All vote for a step, and are at it. */
  finish(whole: Whole, step: number, generation = whole.generation): void {
    for (const shard of this.parameters.keys()) {
      const vote = this.vote(shard, step, { generation })
      whole.vote(vote)
      this.digests[shard] = vote.receipt.digest
    }
  }
}

const open = (log: MemoryLog, generation = 1, head = `head ${generation}`) =>
  Whole.begin({ log, assignment: assignmentOf(HALVES, generation), attentions: [], head })

const refusedAs = (t: Test, code: string, work: () => unknown, message = /./) => {
  t.throws(work, { code, message })
}

t.test('receipts are bit for bit those of one process, however the parameters are shared out', async (t) => {
  const shared = fc.integer({ min: 1, max: 12 }).chain((count) => {
    return fc.array(fc.nat(4), { minLength: count, maxLength: count })
  })
  await t.resolves(
    fc.assert(
      fc.asyncProperty(shared, fc.nat(), async (shardOf, order) => {
        const parameters = [...new Set(shardOf)].map((shard) => [...shardOf.keys()].filter((i) => shardOf[i] === shard))
        const log = new MemoryLog()
        const whole = await Whole.begin({ log, assignment: assignmentOf(parameters), attentions: [], head: 'h' })
        const shards = new Shards(parameters)
        let digest = FIRST_DIGEST
        for (const step of [1, 2, 3]) {
          const expected = receiptOf(step, { digest, records: [...shardOf.keys()].map((i) => recordOf(i, step)) })
          const waiting = whole.ended(step)
          const votes = parameters.map((_, shard) => shards.vote((shard + order) % parameters.length, step))
          for (const vote of votes) whole.vote(vote)
          for (const { shard, receipt } of votes) shards.digests[shard] = receipt.digest
          const { seconds: _, durable: __, ...receipt } = await waiting
          const { seconds: ___, durable: ____, ...rest } = expected
          if (JSON.stringify(receipt) !== JSON.stringify(rest))
            throw new Error(`${JSON.stringify(receipt)}, expected ${JSON.stringify(rest)}`)
          digest = receipt.digest
        }
      }),
      { seed: 1, numRuns: 100 },
    ),
  )
})

t.test('a step is committed when all have voted, and every end of it has the receipt', async (t) => {
  const log = new MemoryLog()
  const whole = await open(log)
  const shards = new Shards(HALVES)
  const ends = [whole.ended(1), whole.ended(1)]
  whole.vote(shards.vote(1, 1))
  t.same([whole.hasVoted(0), whole.hasVoted(1), whole.step], [false, true, 0])
  shards.finish(whole, 1)
  const [one, two] = await Promise.all(ends)
  t.same(one, two)
  t.equal(one?.digest, whole.digest)
  t.equal(one?.replayed, false)
  t.same(await whole.ended(1), { ...one, replayed: true })
  t.same([whole.hasVoted(0), whole.step, whole.generation], [false, 1, 1])
  const entries = (await log.newest()) as Entry
  t.match(entries, { position: 2, kind: 'commit', step: 1, generation: 1, shards: shards.digests })
  t.same(one?.seconds, { receive: 2, queue: 0, compute: 4, send: 1 })
  t.equal(one?.durable, false, 'the log is lost with the process')
  await t.rejects(whole.ended(3), { code: 'STEP_CONFLICT', fields: { expected_step: 2 } })
  await t.rejects(whole.ended(0), { code: 'STEP_CONFLICT' })
})

t.test('a receipt is durable where the log and every shard are', async (t) => {
  class Kept extends MemoryLog {
    override readonly isDurable = true
  }
  for (const durable of [true, false]) {
    const whole = await open(new Kept())
    const shards = new Shards(HALVES)
    const vote = shards.vote(0, 1)
    whole.vote({ ...vote, receipt: { ...vote.receipt, durable } })
    whole.vote(shards.vote(1, 1))
    t.equal((await whole.ended(1)).durable, durable)
  }
})

t.test('clipped heads come in the order of the attentions, the largest logit is that of all shards', async (t) => {
  const log = new MemoryLog()
  const attentions = ['first', 'second', 'third', 'without logits']
  const whole = await Whole.begin({ log, assignment: assignmentOf(HALVES), attentions, head: 'h' })
  const shards = new Shards(HALVES)
  const clipped: Pick<ReceiptFrame, 'clipped_heads' | 'max_logit'>[] = [
    { clipped_heads: { second: 1 }, max_logit: 7 },
    { clipped_heads: { third: 0, first: 2 }, max_logit: 9 },
  ]
  for (const [shard, more] of clipped.entries()) {
    const vote = shards.vote(shard, 1)
    whole.vote({ ...vote, receipt: { ...vote.receipt, ...more } })
  }
  const receipt = await whole.ended(1)
  t.equal(JSON.stringify(receipt.clipped_heads), '{"first":2,"second":1,"third":0}')
  t.equal(receipt.max_logit, 9)
})

t.test('a vote again changes nothing; one that differs is refused, and the first stands', async (t) => {
  const whole = await open(new MemoryLog())
  const shards = new Shards(HALVES)
  const vote = shards.vote(0, 1)
  for (let i = 0; i < 3; i += 1) whole.vote(vote)
  t.equal(whole.step, 0)
  refusedAs(t, 'STEP_CONFLICT', () => whole.vote(shards.vote(0, 1, { variant: 1 })), /shard 0 has voted .* for step 1/)
  shards.finish(whole, 1)
  await whole.ended(1)
  whole.vote(vote)
  const forged = { ...vote, receipt: { ...vote.receipt, digest: FIRST_DIGEST } }
  refusedAs(t, 'STEP_CONFLICT', () => whole.vote(forged), /has voted .* for step 1/)
  shards.finish(whole, 2)
  await whole.ended(2)
  refusedAs(t, 'STEP_CONFLICT', () => whole.vote(vote), /shard 0 votes for step 1, run 'gpt' is at step 2/)
  refusedAs(t, 'STEP_CONFLICT', () => whole.vote(shards.vote(0, 4)), /votes for step 4/)
})

t.test('a vote that no shard of the whole can give is refused', async (t) => {
  const whole = await open(new MemoryLog())
  const shards = new Shards(HALVES)
  const vote = shards.vote(0, 1)
  refusedAs(t, 'PARAMETER_INVALID', () => whole.vote({ ...vote, shard: 2 }), /shard 2, there are shards 0 to 1/)
  refusedAs(t, 'PARAMETER_INVALID', () => whole.vote({ ...vote, records: [] }), /has 0 records, expected 2/)
  shards.digests[0] = 'ab'.repeat(32)
  refusedAs(t, 'STEP_CONFLICT', () => whole.vote(shards.vote(0, 1)), /the shard is not where the run is/)
  for (const generation of [0, 2])
    refusedAs(t, 'STALE_GENERATION', () => whole.vote({ ...vote, generation }), /shard 0 votes with generation/)
})

t.test('shards that have finished another step each are told, and so are those who wait', async (t) => {
  const whole = await open(new MemoryLog())
  const shards = new Shards(HALVES)
  whole.vote(shards.vote(0, 1))
  const waiting = whole.ended(1)
  const vote = shards.vote(1, 1)
  const other = { ...vote, receipt: { ...vote.receipt, groups: { muon: { lr: 3 } } } }
  refusedAs(
    t,
    'STEP_CONFLICT',
    () => whole.vote(other),
    /step 1 has groups {"muon":{"lr":3}} in shard 1, .* in shard 0/,
  )
  await t.rejects(waiting, { code: 'STEP_CONFLICT' })
  const replicas = { ...vote, receipt: { ...vote.receipt, contributors: [{ replica: 0, weight: 1 }] } }
  refusedAs(t, 'STEP_CONFLICT', () => whole.vote(replicas), /contributors/)
  whole.vote(vote)
  t.equal((await whole.ended(1)).step, 1)
})

t.test(
  'a step is of one gradient_scale in all shards; one that has skipped all of its parameters knows of none',
  async (t) => {
    const scaled = (shard: number, gradient_scale: number, isSkipped = false): Vote => {
      const records = HALVES[shard]!.map((index): VotedRecord => {
        const { applied, gradient_square } = recordOf(index, 2)
        return isSkipped || !applied
          ? { gradient_square: 0 }
          : { applied: { ...applied, gradient_scale }, gradient_square }
      })
      return { generation: 1, shard, step: 1, records, receipt: receiptOf(1, { digest: FIRST_DIGEST, records }) }
    }
    const whole = await open(new MemoryLog())
    whole.vote(scaled(0, 0.25))
    const waiting = whole.ended(1)
    refusedAs(
      t,
      'STEP_CONFLICT',
      () => whole.vote(scaled(1, 0.125)),
      /step 1 has gradient_scale 0.125 in shard 1, 0.25 in shard 0: shards have computed other steps/,
    )
    await t.rejects(waiting, { code: 'STEP_CONFLICT' })
    whole.vote(scaled(1, 0.25))
    t.equal((await whole.ended(1)).step, 1)

    const skipping = await open(new MemoryLog())
    skipping.vote(scaled(0, 0.25, true))
    skipping.vote(scaled(1, 0.125))
    t.equal((await skipping.ended(1)).step, 1)
  },
)

t.test('replicas that all shards are of stand in the receipt', async (t) => {
  const whole = await open(new MemoryLog())
  const shards = new Shards(HALVES)
  const contributors = [{ replica: 0, weight: 1 }]
  for (const shard of [0, 1]) {
    const vote = shards.vote(shard, 1)
    whole.vote({ ...vote, receipt: { ...vote.receipt, contributors } })
  }
  t.same((await whole.ended(1)).contributors, contributors)
})

t.test('a head that takes over goes on where the log is, and the one before commits nothing more', async (t) => {
  const log = new MemoryLog()
  const old = await open(log)
  const shards = new Shards(HALVES)
  shards.finish(old, 1)
  const receipt = await old.ended(1)
  const whole = await open(log, 2)
  t.same([whole.step, whole.digest, whole.generation], [1, receipt.digest, 2])
  t.same(await whole.ended(1), { ...receipt, replayed: true })
  await whole.confirm()
  const waiting = old.ended(2)
  old.vote(shards.vote(0, 2))
  old.vote(shards.vote(1, 2))
  await t.rejects(waiting, {
    code: 'STALE_GENERATION',
    message: /is of generation 2 by now, this head has generation 1/,
  })
  t.match(old.over, { code: 'STALE_GENERATION' })
  await t.rejects(old.ended(1), { code: 'STALE_GENERATION' })
  await t.rejects(old.goTo(0), { code: 'STALE_GENERATION' })
  refusedAs(t, 'STALE_GENERATION', () => old.vote(shards.vote(0, 2)))
  t.equal((await log.newest())?.kind, 'begin')
  shards.finish(whole, 2)
  t.equal((await whole.ended(2)).step, 2)
})

t.test('a head that was stopped meanwhile is asked before it sends anybody to its shards', async (t) => {
  const log = new MemoryLog()
  const old = await open(log)
  await old.confirm()
  await open(log, 2)
  t.equal(old.over, undefined)
  await t.rejects(old.confirm(), { code: 'STALE_GENERATION' })
  await t.rejects(old.ended(1), { code: 'STALE_GENERATION' })
})

t.test('who comes too late to be head learns it, and so does a second head of one generation', async (t) => {
  const log = new MemoryLog()
  await open(log, 3)
  await t.rejects(open(log, 2), { code: 'STALE_GENERATION' })
  await t.rejects(open(log, 3, 'another'), { code: 'STALE_GENERATION' })
  t.equal((await open(log, 3)).generation, 3, 'the same head may ask again')
})

t.test('the number of shards cannot change', async (t) => {
  const log = new MemoryLog()
  await open(log)
  const assignment = assignmentOf([[0, 1, 2, 3]], 2)
  await t.rejects(Whole.begin({ log, assignment, attentions: [], head: 'h' }), {
    code: 'RUN_MISMATCH',
    message: /2 shards in its log, 1 are assigned/,
  })
})

/** A log whose next answers are another process's doing: it may be late, lose its answers, or refuse. */
class TroubledLog extends MemoryLog {
  before: (() => Promise<unknown>) | undefined
  isAnswerLost = false
  isRefused = false
  isOld = false

  override async put(entry: Entry): Promise<Entry> {
    const { before } = this
    this.before = undefined
    await before?.()
    if (this.isRefused) throw new ServiceError('STORAGE_FAILED', 'the store refuses')
    const put = await super.put(entry)
    if (!this.isAnswerLost) return put
    this.isAnswerLost = false
    throw new ServiceError('STORAGE_FAILED', 'the answer is lost')
  }

  override async newest(): Promise<Entry | undefined> {
    const newest = await super.newest()
    return this.isOld && newest ? await this.read(newest.position - 1) : newest
  }
}

t.test('a commit of the head before that comes while another takes over is followed', async (t) => {
  const log = new TroubledLog()
  const old = await open(log)
  const shards = new Shards(HALVES)
  log.before = async () => {
    shards.finish(old, 1)
    await old.ended(1)
  }
  const whole = await open(log, 2)
  t.equal(whole.step, 1)
  log.isOld = true
  t.equal((await open(log, 3)).step, 1, 'and so is one that a list does not have yet')
})

t.test('a put that fails may have written: it is put again when somebody asks', async (t) => {
  for (const trouble of ['isAnswerLost', 'isRefused'] as const) {
    const log = new TroubledLog()
    const whole = await open(log)
    const shards = new Shards(HALVES)
    log[trouble] = true
    const waiting = whole.ended(1)
    shards.finish(whole, 1)
    await t.rejects(waiting, { code: 'STORAGE_FAILED' })
    t.equal(whole.step, 0)
    log[trouble] = false
    const receipt = await whole.ended(1)
    t.equal(receipt.step, 1)
    t.equal((await log.newest())?.position, 2)
  }
  const log = new TroubledLog()
  log.isAnswerLost = true
  await t.rejects(open(log), { code: 'STORAGE_FAILED' })
  t.equal((await open(log)).generation, 1)
})

t.test('going back: later commits count no more, and their steps are committed anew', async (t) => {
  const log = new MemoryLog()
  const first = await open(log)
  const shards = new Shards(HALVES)
  const points: string[][] = [[...shards.digests]]
  for (const step of [1, 2, 3]) {
    shards.finish(first, step)
    await first.ended(step)
    points.push([...shards.digests])
  }
  const whole = await open(log, 2)
  const waiting = whole.ended(4)
  await t.rejects(whole.goTo(4), { code: 'NOT_FOUND', message: /was never at step 4/ })
  await whole.goTo(1)
  await t.rejects(waiting, { code: 'STEP_CONFLICT', message: /has gone back to step 1/, fields: { expected_step: 2 } })
  t.same([whole.step, whole.standing.shards], [1, points[1]])
  shards.digests.splice(0, 2, ...points[1]!)
  for (const shard of [0, 1]) {
    const vote = shards.vote(shard, 2, { generation: 2, variant: 1 })
    whole.vote(vote)
    shards.digests[shard] = vote.receipt.digest
  }
  const receipt = await whole.ended(2)
  const third = await open(log, 3)
  t.equal((await third.find(2))?.digest, receipt.digest, 'the step that counts, not the one before')
  t.equal(await third.find(3), undefined)
  await third.goTo(0)
  t.same([third.digest, third.standing.receipt], [FIRST_DIGEST, undefined])
  await t.rejects(third.ended(0), { code: 'STEP_CONFLICT' })
})

t.test('a whole that begins elsewhere than at step 0', async (t) => {
  const log = new MemoryLog()
  const start = { step: 7, digest: 'aa'.repeat(32), shards: ['bb'.repeat(32), 'cc'.repeat(32)] }
  const whole = await Whole.begin({ log, assignment: assignmentOf(HALVES), attentions: [], head: 'h', start })
  t.same([whole.step, whole.digest], [7, start.digest])
  t.equal(await whole.find(0), undefined)
})

t.test('a whole that is closed says why', async (t) => {
  const whole = await open(new MemoryLog())
  const waiting = whole.ended(1)
  whole.close(new ServiceError('DRAINING', 'the service ends'))
  whole.close(new ServiceError('INTERNAL', 'this comes later'))
  await t.rejects(waiting, { code: 'DRAINING' })
  refusedAs(t, 'DRAINING', () => whole.vote(new Shards(HALVES).vote(0, 1)))
})

t.test('a log has no gaps', async (t) => {
  const log = new MemoryLog()
  const entry = { kind: 'begin', generation: 1, head: 'h', step: 0, digest: FIRST_DIGEST, shards: [] } as const
  await t.rejects(log.put({ ...entry, position: 2 }), { message: /the log would have a gap/ })
})
