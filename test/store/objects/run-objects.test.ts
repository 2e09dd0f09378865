import { randomUUID } from 'node:crypto'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { CheckpointFiles } from '../../../src/store/checkpoint/checkpoint-files.js'
import { newIdentity } from '../../../src/store/identity.js'
import { checkpointObjects } from '../../../src/store/objects/checkpoint-objects.js'
import { DataObjects } from '../../../src/store/objects/data-objects.js'
import { FolderObjects } from '../../../src/store/objects/folder-objects.js'
import { type Objects, StoreError } from '../../../src/store/objects/objects.js'
import { openIndex, sealIndex } from '../../../src/store/objects/run-index.js'
import { RunObjects } from '../../../src/store/objects/run-objects.js'
import { RunStore } from '../../../src/store/run-store.js'
import { seeded } from '../../reference.js'
import { turn } from '../../service.js'
import { inline, snapshot } from '../snapshots.js'
import { around } from './around.js'

const files = new CheckpointFiles()
t.teardown(() => files.close())
const nothing = () => {}
const all = async <T>(items: AsyncIterable<T>) => {
  const found: T[] = []
  for await (const item of items) found.push(item)
  return found
}

/** A folder of objects that services with any generation have their runs in. */
function place(t: Test) {
  const root = `${t.testdir({})}/${randomUUID()}`
  const objects = new FolderObjects(root)
  let number = 0
  const means = (generation: number, seen: Objects = objects) => ({
    ...{ objects: seen, files, generation },
    address: { kind: 'folder', root } as const,
    number: () => ++number,
  })
  return { objects, run: (generation: number, seen?: Objects) => new RunObjects(means(generation, seen), 'r') }
}

/** Throws where anything that counts is not whole, or lacks a byte. */
async function readAll(store: RunStore): Promise<void> {
  for (const entry of store.checkpoints)
    await store.read(entry, await store.manifest(entry), { targets: new Map(), locations: [] })
}

const ids = ({ checkpoints }: RunStore) => checkpoints.map(({ checkpoint }) => checkpoint)

t.test('a run is kept as it is in a folder: ids, tags, count, branches', async (t) => {
  const { run, objects } = place(t)
  const store = await RunStore.create(run(1), 'r')
  await store.identify({ epoch: 3 })
  for (const step of [1, 2, 3, 4, 5]) await store.write(snapshot(step, { tags: step === 2 ? ['best'] : [] }), nothing)
  await store.retain(2)
  await store.tag(store.find('step-000000000004')!, 'best')
  await store.tag(store.find('step-000000000004')!, 'best')
  t.same((await store.manifest(store.newest!)).tags, [])
  t.same((await store.manifest(store.find('best')!)).tags, ['best'])
  await store.retain(1)
  t.same(ids(store), ['step-000000000004', 'step-000000000005'])
  await store.goBack(store.newest!)
  t.equal(store.identity.branch, 0, 'nothing came after it')
  await store.goBack(store.find('step-000000000004')!)
  await store.sweep()
  t.same(ids(store), ['step-000000000004'])
  await store.write(snapshot(5), nothing)
  const again = await RunStore.open(run(2))
  t.same(again.checkpoints, store.checkpoints)
  t.same(again.identity, JSON.parse(JSON.stringify(store.identity)))
  t.match(again.identity, { epoch: 3, branch: 1 })
  await readAll(again)
  t.same([await again.hasSteps(), await again.readJournal(0)], [false, { steps: [] }])
  await again.clearJournal()
  t.match(await RunStore.open(run(3), { tidy: false }), { path: /runs\/r$/ })
  await again.write(snapshot(6), nothing)
  t.same(await all(objects.unfinished('')), [])
})

t.test('what is not what was written is told, and an object that is missing', async (t) => {
  const { run, objects } = place(t)
  await t.rejects(RunStore.open(run(1)), { name: 'UnreadableError', message: /runs\/r has no run\.json/ })
  const store = await RunStore.create(run(1), 'r')
  const entry = await store.write(snapshot(1), nothing)
  const [manifest] = (await all(objects.list(''))).filter((key) => key.endsWith('manifest.json'))
  const text = (await objects.get(manifest!))!.bytes
  await objects.put(manifest!, Buffer.from(text.toString().replace('"step": 1', '"step": 2')))
  await t.rejects(store.manifest(entry), { name: 'UnreadableError', message: /has SHA-256/ })
  await objects.delete([manifest!])
  await t.rejects(store.manifest(entry), { name: 'UnreadableError', message: /manifest\.json is missing/ })
  await objects.put(manifest!, text)
  const [first] = (await store.manifest(entry)).files
  await objects.delete([manifest!.replace('manifest.json', first!.name)])
  const read = store.read(entry, await store.manifest(entry), { targets: new Map(), locations: [] })
  await t.rejects(read, {
    name: 'UnreadableError',
    message: /cannot be opened: there is no object runs\/r\/checkpoints/,
  })
  const index = (await objects.get('runs/r/run.json'))!.bytes
  await objects.put('runs/s/run.json', index)
  const other = new RunObjects(
    { objects, files, generation: 2, address: { kind: 'folder', root: '' }, number: () => 1 },
    's',
  )
  await t.rejects(RunStore.open(other), { message: /run is "r", expected 's' as its key has it/ })
})

t.test('a run that was deleted leaves its name free, and no object but one', async (t) => {
  const { run, objects } = place(t)
  const medium = run(1)
  await run(1).create(newIdentity('r'))
  const store = await RunStore.create(medium, 'r')
  await store.write(snapshot(1), nothing)
  await t.rejects(run(1).create(newIdentity('r')), { name: 'StoreError', message: /is there already/ })
  t.equal(await run(1).isDeleted(), false)
  await medium.destroy()
  t.equal(await run(2).isDeleted(), true)
  t.same(await all(objects.list('')), ['runs/r/run.json'])
  const anew = await RunStore.create(run(2), 'r')
  t.same(ids(anew), [])
  await t.rejects(RunStore.create(run(1), 'r'), {
    message: /was taken by a service of generation 2, this one has generation 1/,
  })
  const unread = run(3)
  await unread.destroy()
  t.equal(await run(3).isDeleted(), true)
  const ghost = await RunStore.create(run(3), 'r')
  await ghost.write(snapshot(1), nothing)
  const over = await RunStore.create(run(4), 'r')
  t.same(
    [ids(over), await all(objects.list('runs/r/checkpoints/'))],
    [[], []],
    'a service that was taken to be dead made it',
  )
  await objects.delete(['runs/r/run.json'])
  t.equal(await run(4).isDeleted(), true)
  await t.rejects(over.identify({ epoch: 9 }), { message: /was taken by another service/ })
  const racing = place(t)
  const lost = around(racing.objects, {
    before: (call) => call === 'putIfAbsent' && racing.run(2).create(newIdentity('r')),
  })
  await t.rejects(RunStore.create(racing.run(1, lost), 'r'), { message: /was taken by another service/ })
})

t.test('a write that has failed for all that is known is made good by the next one', async (t) => {
  const { run, objects } = place(t)
  let losses = 0
  const lossy = around(objects, {
    after: (call) => {
      if (call === 'putIfUnchanged' && losses-- > 0) throw new StoreError('the answer is lost')
    },
  })
  const store = await RunStore.create(run(1, lossy), 'r')
  losses = 1
  await t.rejects(store.write(snapshot(1), nothing), { message: 'the answer is lost' })
  const folders = async () => new Set((await all(objects.list('runs/r/checkpoints/'))).map((key) => key.split('/')[3]))
  t.equal((await folders()).size, 1, 'it may count')
  t.same(ids(await RunStore.open(run(1), { tidy: false })), ['step-000000000001'])
  await store.identify({ epoch: 1 })
  t.same(ids(await RunStore.open(run(1), { tidy: false })), [], 'what was refused does not count')
  t.equal((await folders()).size, 0, 'and nothing is left of it')
  await store.write(snapshot(1), nothing)
  await readAll(await RunStore.open(run(2)))
})

t.test('a service that loses the run while it removes garbage removes nothing of the next one', async (t) => {
  const { run, objects } = place(t)
  await (await RunStore.create(run(1), 'r')).write(snapshot(1), nothing)
  let next: RunStore | undefined
  const slow = around(objects, {
    before: async (call) => {
      if (call !== 'list' || next) return
      next = await RunStore.open(run(3))
      await next.write(snapshot(2), nothing)
    },
  })
  const losing = await RunStore.open(run(2, slow))
  t.same(ids(losing), ['step-000000000001'])
  await t.rejects(losing.write(snapshot(3), nothing), { message: /was taken by a service of generation 3/ })
  const last = await RunStore.open(run(4))
  t.same(ids(last), ['step-000000000001', 'step-000000000002'])
  await readAll(last)
})

t.test('what a service was uploading when it died is removed by the next one, and not by itself', async (t) => {
  const { run, objects } = place(t)
  await RunStore.create(run(1), 'r')
  const upload = objects.upload('runs/r/checkpoints/step-000000000001@1.9/state.safetensors')
  await upload.write(Buffer.from('half'))
  await RunStore.open(run(1))
  t.equal((await all(objects.unfinished('runs/r/'))).length, 1)
  await RunStore.open(run(2))
  t.same(await all(objects.unfinished('')), [])
  await upload.abort()
})

t.test('an upload that cannot be removed now is let go of', async (t) => {
  const { objects } = place(t)
  const abort = async () => {
    throw new StoreError('it is busy')
  }
  const stuck = new Proxy(objects, {
    get: (target, name) => (name === 'upload' ? () => ({ abort }) : Reflect.get(target, name)),
  })
  const sink = await checkpointObjects(stuck, 'folder').create('state.safetensors', 4)
  await t.resolves(sink.close())
})

t.test('a store lists its runs, those that cannot be read too, and is let go of where it cannot', async (t) => {
  const root = t.testdir({})
  const objects = new FolderObjects(root)
  const options = { wait_seconds: 0, lease_seconds: 30, observe: nothing }
  const open = () => DataObjects.open({ kind: 'folder', root }, options)
  const first = await open()
  await first.create('r')
  await first.create('gone')
  await first.destroy('gone')
  await objects.put('runs/broken/run.json', Buffer.from('{}'))
  await objects.put('runs/r/aside', Buffer.from('x'))
  await first.close()
  const second = await open()
  t.same(second.names, ['broken', 'r'])
  await t.rejects(second.find('broken'), { name: 'UnreadableError', message: /does not end with its SHA-256/ })
  await second.destroy('r')
  await second.close()
  const { bytes } = (await objects.get('runs/r/run.json'))!
  const index = { ...openIndex(bytes, 'run.json', 'r'), generation: 99 }
  await objects.put('runs/r/run.json', sealIndex(index))
  const message = /cannot be used: .* was taken by a service of generation 99, this one has generation 3/
  await t.rejects(open(), { name: 'ConfigError', message })
  await objects.delete(['runs/r/run.json'])
  const third = await open()
  t.same(third.names, ['broken'], 'it was let go of')
  await third.close()
})

t.test('services take a run from each other at any moment: what was told stays, what counts is whole', async (t) => {
  const acts = fc.array(fc.constantFrom('write', 'write', 'remove', 'tag', 'back', 'retain'), {
    minLength: 1,
    maxLength: 6,
  })
  await fc.assert(
    fc.asyncProperty(fc.array(acts, { minLength: 2, maxLength: 5 }), fc.integer({ min: 1 }), async (scripts, seed) => {
      const { run, objects } = place(t)
      const random = seeded(seed)
      const wait = async () => {
        for (let turns = Math.floor(random() ** 4 * 40); turns > 0; turns -= 1) await turn()
      }
      await RunStore.create(run(1), 'r')
      /** Ids of checkpoints whose writing was told, less those that somebody has begun to remove. */
      const told = new Set<string>()
      const service = async (script: readonly string[], generation: number) => {
        for (let late = 0; late < generation; late++) await wait()
        const store = await RunStore.open(run(generation, around(objects, { before: wait })))
        for (const act of script) await perform(store, act, told)
      }
      const ended = await Promise.allSettled(scripts.map((script, i) => service(script, i + 2)))
      // The uploads of a service that has lost the run are removed under its hands.
      const expected = /was taken by|ENOENT.*\.unfinished/
      for (const one of ended) if (one.status === 'rejected' && !expected.test(one.reason.message)) throw one.reason
      const last = await RunStore.open(run(scripts.length + 2))
      await readAll(last)
      const counts = new Set(ids(last))
      for (const id of told) t.ok(counts.has(id), `${id} was told and is there`)
      const keys = await all(objects.list('runs/r/checkpoints/'))
      const folders = new Set(keys.map((key) => key.split('/')[3]))
      t.equal(folders.size, counts.size, 'nothing is left of what does not count')
      t.same(await all(objects.unfinished('')), [])
    }),
    { numRuns: 25, seed: 7 },
  )
})

let step = 0

async function perform(store: RunStore, act: string, told: Set<string>): Promise<void> {
  const [oldest] = store.checkpoints
  const gone = (kept: readonly string[]) => {
    for (const id of ids(store)) if (!kept.includes(id)) told.delete(id)
  }
  if (act === 'write') {
    step += 1
    told.add((await store.write(snapshot(step, { entries: [inline('a', 8), inline('b', 4000)] }), nothing)).checkpoint)
  }
  if (oldest === undefined) return
  if (act === 'tag') await store.tag(oldest, 'kept')
  if (act === 'remove' && oldest !== store.newest) {
    gone(ids(store).slice(1))
    await store.remove(oldest)
  }
  if (act === 'retain') {
    gone([])
    await store.retain(1)
  }
  if (act === 'back' && oldest.problem === undefined) {
    gone([])
    await store.goBack(oldest)
    await store.sweep()
  }
}
