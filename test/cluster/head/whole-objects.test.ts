import t from 'tap'
import type { Entry } from '../../../src/cluster/commit-log.js'
import { WholeObjects } from '../../../src/cluster/head/whole-objects.js'
import type { StoredLog } from '../../../src/cluster/head/whole-store.js'
import { Whole } from '../../../src/cluster/whole.js'
import { S3Objects } from '../../../src/store/objects/s3/s3-objects.js'
import { type Fault, TestStore } from '../../store/objects/stores.js'
import { receiptOf, recordOf } from '../records.js'
import { beginAt, checkpointAt, entryAt, flipped, RECORD } from './wholes.js'

// What only a place that several processes share has to keep to.

const store = await TestStore.start(t)
t.afterEach(() => {
  store.fault = () => undefined
  store.down = false
})

/** A place of its own, and what each process sees of it. */
function place() {
  const address = store.address()
  const objects = new S3Objects(address, () => {})
  const keys = async (prefix = '') => {
    const found: string[] = []
    for await (const key of objects.list(prefix)) found.push(key)
    return found
  }
  return { objects, keys, process: () => new WholeObjects(new S3Objects(address, () => {})) }
}

/** What happens to the first so many requests of a method for a key that has this part. */
function faults(fault: Fault, method: string, part: string, times = 1): void {
  let left = times
  store.fault = (passing) => {
    return passing.method === method && passing.key.includes(part) && left-- > 0 ? fault : undefined
  }
}

const PROCESSES = 8

t.test('of many processes that put an entry at one position one does, and all are told which', async (t) => {
  const { process } = place()
  await process().create(RECORD)
  const logs = await Promise.all(Array.from({ length: PROCESSES }, async () => (await process().read('gpt')).log))
  for (const position of [1, 2, 3]) {
    const stand = await Promise.all(logs.map((log, i) => log.put(entryAt(position, `head ${i}`))))
    t.equal(new Set(stand.map(({ head }) => head)).size, 1, `position ${position}`)
    t.same(await logs[0]!.read(position), stand[0])
  }
  t.same(await (await process().read('gpt')).log.newest(), await logs[1]!.read(3))
})

t.test('an entry whose answer was lost is put again, and is that of its writer', async (t) => {
  const { process } = place()
  const { log } = await process().create(RECORD)
  for (const [i, fault] of (['lost', 'busy', 'cut', 'conflict'] as const).entries()) {
    const entry = entryAt(i + 1)
    faults(fault, 'PUT', 'logs/')
    if (fault !== 'conflict') t.same(await log.put(entry), entry, fault)
    else await t.rejects(log.put(entry), { code: 'STORAGE_FAILED', message: /was not written, and is not there/ })
  }
  // All attempts of one put: whether it has written is not known.
  faults('lost', 'PUT', 'logs/', 5)
  await t.rejects(log.put(entryAt(4)), { code: 'STORAGE_FAILED', message: /put logs\/gpt/ })
  const { log: other } = await process().read('gpt')
  t.same(await other.put(entryAt(4, 'another head')), entryAt(4), 'it has')
  t.same(await log.put(entryAt(4)), entryAt(4))
  faults('cut', 'PUT', 'logs/', 5)
  await t.rejects(log.put(entryAt(5)), { code: 'STORAGE_FAILED' })
  t.same(await other.put(entryAt(5, 'another head')), entryAt(5, 'another head'), 'it has not')
  t.same(await log.put(entryAt(5)), entryAt(5, 'another head'))
})

t.test('a head that another one has followed commits nothing', async (t) => {
  const { process } = place()
  const { log } = await process().create(RECORD)
  const begin = (log: StoredLog, generation: number) => {
    const assignment = { run: 'gpt', generation, shards: RECORD.shards }
    return Whole.begin({ log, assignment, attentions: [], head: `head ${generation}` })
  }
  const vote = (whole: Whole, step: number) => {
    const records = [recordOf(0, step)]
    const receipt = receiptOf(step, { digest: whole.standing.shards[0]!, records })
    whole.vote({ generation: whole.generation, shard: 0, step, records, receipt })
    return whole.ended(step)
  }
  const before = await begin(log, 1)
  await vote(before, 1)
  const next = await begin((await process().read('gpt')).log, 2)
  t.equal(next.step, 1)
  await t.rejects(vote(before, 2), { code: 'STALE_GENERATION' })
  t.match(await vote(next, 2), { step: 2, durable: true })
})

t.test('an entry that is missing is told: no log begins anew because somebody has removed some of it', async (t) => {
  for (const lost of [1, 3, 4]) {
    const { process, objects, keys } = place()
    const { log } = await process().create(RECORD)
    for (let position = 1; position <= 5; position++) await log.put(entryAt(position))
    const { log: other } = await process().read('gpt')
    await objects.delete([(await keys('logs/'))[lost - 1]!])
    const missing = { code: 'CHECKPOINT_UNREADABLE', message: new RegExp(`logs/gpt/.*0${lost} is missing`) }
    t.same(await other.newest(), entryAt(5), 'who has seen a later one goes on')
    await t.rejects(other.read(lost), missing)
    // The newest entry is searched for in leaps, and one of these goes over the third.
    if (lost === 3) await t.rejects((await process().read('gpt')).log.read(lost), missing)
    else await t.rejects(process().read('gpt'), missing)
  }
})

t.test('an entry that is another one is never taken for one', async (t) => {
  const { process, objects, keys } = place()
  const { log } = await process().create(RECORD)
  for (const position of [1, 2]) await log.put(entryAt(position))
  const [first, second] = await keys('logs/')
  const text = (await objects.get(second!))!.bytes
  for (const wrong of [flipped(text), (await objects.get(first!))!.bytes, Buffer.alloc(0)]) {
    await objects.put(second!, wrong)
    const unreadable = { code: 'CHECKPOINT_UNREADABLE', message: /logs\/gpt\/.*2/ }
    await t.rejects(process().read('gpt'), unreadable)
    await t.rejects(log.read(2), unreadable)
    await t.rejects(log.put(entryAt(2)), unreadable)
  }
})

t.test('of many processes that create a whole one does, where there was none and where one was removed', async (t) => {
  const { process } = place()
  for (const round of [1, 2]) {
    const created_at = (i: number) => `2026-01-01T00:00:0${i}.000Z`
    const made = await Promise.allSettled(
      Array.from({ length: PROCESSES }, (_, i) => process().create({ ...RECORD, created_at: created_at(i) })),
    )
    const winner = made.findIndex(({ status }) => status === 'fulfilled')
    const reasons = made.flatMap((one) => (one.status === 'rejected' ? [one.reason.code] : []))
    t.same(
      reasons,
      Array.from({ length: PROCESSES - 1 }, () => 'RUN_EXISTS'),
      `round ${round}`,
    )
    t.equal((await process().read('gpt')).record.created_at, created_at(winner))
    const removed = await Promise.allSettled([process().remove('gpt'), process().remove('gpt')])
    const refusal = removed.find((one) => one.status === 'rejected')
    t.ok(removed.some(({ status }) => status === 'fulfilled'))
    if (refusal) t.match(refusal.reason.code, /^(RUN_NOT_FOUND|STALE_GENERATION)$/)
    t.equal(await process().has('gpt'), false)
  }
})

t.test('checkpoints that two heads keep are all there, and what one takes away is gone', async (t) => {
  const { process } = place()
  const [one, other] = [process(), process()]
  await one.create(RECORD)
  await other.read('gpt')
  const [first, second, third, fourth] = [1, 2, 3, 4].map((step) => checkpointAt(step))
  t.same(await one.keepCheckpoints('gpt', [first!]), [first])
  t.same(await other.keepCheckpoints('gpt', [second!]), [first, second], 'it is told of that of the other one')
  t.same(await one.keepCheckpoints('gpt', [first!, third!]), [second, first, third])
  t.same(await one.keepCheckpoints('gpt', [second!, third!]), [second, third])
  t.same(await other.keepCheckpoints('gpt', [first!, second!, fourth!]), [third, first, second, fourth])
  await Promise.all([one, other].map((each, i) => each.keepCheckpoints('gpt', [checkpointAt(9, i)])))
  const names = (await process().read('gpt')).checkpoints.map(({ checkpoint }) => checkpoint)
  t.same(names.sort(), ['9-0-0', '9-1-0'], 'at once: each has taken away what it had known, and none what it had not')
})

t.test('heads that are always in the way of each other are told', async (t) => {
  const { process } = place()
  const wholes = process()
  await wholes.create(RECORD)
  store.fault = ({ method, key }) => (method === 'PUT' && key.includes('checkpoints/') ? 'conflict' : undefined)
  const message = /the checkpoints of run 'gpt' were written by others 16 times in a row/
  await t.rejects(wholes.keepCheckpoints('gpt', [checkpointAt(1)]), { code: 'STORAGE_FAILED', message })
})

t.test('of a whole that was removed no head commits a step, nor of one of the same name', async (t) => {
  const { process, keys } = place()
  const { log } = await process().create(RECORD)
  const entries: Entry[] = [beginAt(1, 0)]
  for (const step of [1, 2, 3]) entries.push({ ...beginAt(step + 1, step, 1), kind: 'commit' })
  entries.push(beginAt(5, 3), { ...beginAt(6, 4, 5), kind: 'commit' }, { ...beginAt(7, 5, 5), kind: 'commit' })
  for (const entry of entries.slice(0, 4)) await log.put(entry)
  // Heads that were stopped at the end of their time, of which none knows more.
  const stopped = [log, (await process().read('gpt')).log]
  const late = process()
  await late.read('gpt')
  const { log: last } = await process().read('gpt')
  for (const entry of entries.slice(4)) await last.put(entry)
  await process().remove('gpt')
  const left = (await keys('logs/')).map((key) => Number(key.slice(-12)))
  t.same(left, [1, 5, 8], 'the entries that heads began with, and that of the deletion')
  for (const head of stopped)
    t.match(await head.put({ ...beginAt(5, 4, 1), kind: 'commit' }), { kind: 'begin', head: 'head 5' })
  t.match(await last.put({ ...beginAt(8, 6, 5), kind: 'commit' }), { kind: 'begin', head: /^deletion / })
  await t.rejects(late.keepCheckpoints('gpt', [checkpointAt(1)]), { code: 'RUN_NOT_FOUND' })
  const { log: anew } = await process().create(RECORD)
  await t.rejects(late.keepCheckpoints('gpt', [checkpointAt(1)]), { code: 'RUN_NOT_FOUND' })
  t.equal(await anew.newest(), undefined)
})

t.test('a removal that another one was faster than has removed nothing', async (t) => {
  const { process } = place()
  await process().create(RECORD)
  let next: Promise<unknown> | undefined
  store.fault = ({ method, key }) => {
    if (method !== 'PUT' || !key.includes('wholes/') || next) return undefined
    next = process()
      .remove('gpt')
      .then(() => process().create(RECORD))
    return next
  }
  await t.rejects(process().remove('gpt'), { code: 'RUN_NOT_FOUND' })
  t.equal(await process().has('gpt'), true)
})

t.test('a whole under the name of another one is none, and its name is not free', async (t) => {
  const { process, objects } = place()
  await process().create(RECORD)
  await objects.put('wholes/other.json', (await objects.get('wholes/gpt.json'))!.bytes)
  const message = /wholes\/other.json: run is "gpt", expected 'other'/
  await t.rejects(process().read('other'), { code: 'CHECKPOINT_UNREADABLE', message })
  await t.rejects(process().create({ ...RECORD, run: 'other' }), { code: 'CHECKPOINT_UNREADABLE' })
  t.same(await process().names(), ['gpt', 'other'])
})

t.test('a store that does not answer is told by every call', async (t) => {
  const { process } = place()
  const wholes = process()
  const { log } = await wholes.create(RECORD)
  store.fault = () => 'denied'
  const calls: Record<string, () => Promise<unknown>> = {
    names: () => wholes.names(),
    create: () => wholes.create(RECORD),
    read: () => wholes.read('gpt'),
    has: () => wholes.has('gpt'),
    keepCheckpoints: () => wholes.keepCheckpoints('gpt', []),
    remove: () => wholes.remove('gpt'),
    put: () => log.put(entryAt(1)),
    newest: () => log.newest(),
    'read of the log': () => log.read(1),
  }
  for (const [name, call] of Object.entries(calls))
    await t.rejects(call(), { code: 'STORAGE_FAILED', message: /403 AccessDenied/ }, name)
})
