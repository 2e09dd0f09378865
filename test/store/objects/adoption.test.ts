import { randomUUID } from 'node:crypto'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { configOf } from '../../../src/config.js'
import { createMetrics } from '../../../src/metrics.js'
import { CheckpointFiles } from '../../../src/store/checkpoint/checkpoint-files.js'
import { DataObjects } from '../../../src/store/objects/data-objects.js'
import { FolderObjects } from '../../../src/store/objects/folder-objects.js'
import { type Objects, StoreError } from '../../../src/store/objects/objects.js'
import { type ObjectsAddress, openObjects } from '../../../src/store/objects/open-objects.js'
import { RunObjects } from '../../../src/store/objects/run-objects.js'
import { placeOf } from '../../../src/store/objects/s3/s3-address.js'
import { openData } from '../../../src/store/open-data.js'
import { RunStore } from '../../../src/store/run-store.js'
import { known, type Trace, train, undisturbed } from '../../run/trainer.js'
import { type Service, startService } from '../../service.js'
import { inline, snapshot } from '../snapshots.js'
import { around } from './around.js'
import { TestStore } from './stores.js'

// A run that goes from one process to another, each of which has a place of its own in one store.

const store = await TestStore.start(t)
const files = new CheckpointFiles()
t.teardown(() => files.close())
t.afterEach(() => {
  store.fault = () => undefined
})
const nothing = () => {}
const [ONE, OTHER] = ['http://muond-0.muond:8787', 'http://muond-1.muond:8787']

async function all(objects: Objects): Promise<Map<string, string>> {
  const found = new Map<string, string>()
  for await (const key of objects.list('runs/')) found.set(key, (await objects.get(key))!.bytes.toString('base64'))
  return found
}

/** What of a run has to be the same wherever it lies: what counts of it, and every byte of its checkpoints. */
async function contentOf(store: RunStore) {
  const { checkpoints, identity, newest } = store
  const manifests = await Promise.all(checkpoints.map((entry) => store.manifest(entry)))
  // Throws where a file has another hash than its manifest says.
  for (const [i, entry] of checkpoints.entries())
    await store.read(entry, manifests[i]!, { targets: new Map(), locations: [] })
  return JSON.parse(JSON.stringify({ checkpoints, identity, newest, manifests }))
}

const ROOTS: Record<string, (t: Test) => (origin: string) => ObjectsAddress> = {
  'in a folder': (t) => {
    const root = `${t.testdir({})}/${randomUUID()}`
    return (origin) => ({ kind: 'folder', root: `${root}/${encodeURIComponent(origin)}` })
  },
  'in S3': () => {
    const address = store.address()
    return (origin) => placeOf(origin, address)
  },
}

const open = (place: (origin: string) => ObjectsAddress, origin: string) =>
  DataObjects.open(place(origin), { wait_seconds: 5, lease_seconds: 1, observe: nothing, placeOf: place })

for (const [where, root] of Object.entries(ROOTS)) {
  t.test(`a run is taken over from another process's place ${where}, and that goes on as it was`, async (t) => {
    const place = root(t)
    const [one, other] = [await open(place, ONE), await open(place, OTHER)]
    const run = await one.create('r')
    await run.identify({ epoch: 3, replacement: { step: 4, groups: [] } })
    for (const step of [1, 2, 3, 4]) {
      const entries = [inline('a', 8), inline('b', 40_000)]
      await run.write(snapshot(step, { entries, tags: step === 2 ? ['best'] : [] }), nothing)
    }
    await run.goBack(run.find('best')!)
    await run.write(snapshot(3), nothing)
    const objects = await openObjects(place(ONE), nothing)
    const before = await all(objects)
    t.equal(await other.adopt!('r', ONE), true)
    const taken = await other.find('r')
    const content = await contentOf(run)
    t.same(await contentOf(taken), content)
    t.same(await all(objects), before, 'nothing is changed where it was')

    await run.write(snapshot(7), nothing)
    await run.retain(1)
    await contentOf(run)
    t.same(await contentOf(taken), content, 'nor here by what happens there')
    await one.destroy('r')
    await taken.write(snapshot(8), nothing)
    t.equal((await contentOf(taken)).newest.step, 8)

    t.equal(await other.adopt!('none', ONE), false)
    t.equal(await one.adopt!('none', OTHER), false)
    await t.rejects(other.adopt!('r', ONE), { name: 'StoreError', message: /runs\/r is there already/ })
    await other.destroy('r')
    t.equal(await other.adopt!('r', ONE), false, 'it was deleted there, too')
    const anew = await one.create('r')
    await anew.write(snapshot(1), nothing)
    t.equal(await other.adopt!('r', ONE), true, 'the name of one that was deleted is free')
    const last = await contentOf(anew)
    t.same(await contentOf(await other.find('r')), last)
    await one.close()
    await other.close()
    const again = await open(place, OTHER)
    t.same(again.names, ['r'])
    t.same(await contentOf(await again.find('r')), last)
    await again.close()
  })
}

t.test('a process that is in no cluster takes nothing over', async (t) => {
  const root = t.testdir({})
  const alone = await DataObjects.open(
    { kind: 'folder', root },
    { wait_seconds: 0, lease_seconds: 30, observe: nothing },
  )
  t.equal(alone.adopt, undefined)
  await alone.close()
})

/** Two places in a folder: what happens between two requests to the first of them is a test's to say. */
function places(t: Test) {
  const root = `${t.testdir({})}/${randomUUID()}`
  const addressOf = (name: string) => ({ kind: 'folder', root: `${root}/${name}` }) as const
  let number = 0
  const runOf = (name: string, objects: Objects = new FolderObjects(addressOf(name).root), generation = 1) =>
    new RunObjects({ objects, files, generation, address: addressOf(name), number: () => ++number }, 'r')
  const there = new FolderObjects(addressOf('one').root)
  const here = new FolderObjects(addressOf('other').root)
  return { there, here, address: addressOf('one'), runOf }
}

t.test('a run is taken over as it was at one moment, whatever its process writes and removes meanwhile', async (t) => {
  const acts = fc.array(fc.constantFrom('write', 'write', 'prune', 'tag', 'none', 'none'), { maxLength: 12 })
  await fc.assert(
    fc.asyncProperty(acts, async (script) => {
      const { there, here, address, runOf } = places(t)
      const run = await RunStore.create(runOf('one'), 'r')
      const states: unknown[] = []
      const note = async () => states.push(await contentOf(run))
      let step = 0
      const write = () => run.write(snapshot(++step, { entries: [inline('a', 8), inline('b', 4000)] }), nothing)
      for (let first = 0; first < 3; first++) await write()
      await note()
      const left = [...script]
      const before = async () => {
        const act = left.shift()
        if (act === 'write') await write()
        if (act === 'prune') await run.retain(1)
        if (act === 'tag') await run.tag(run.newest!, `at ${left.length}`)
        if (act) await note()
      }
      // The folder is copied by the one that takes the run over: what is done there is done before each of its copies.
      const objects = around(here, { before: (call) => (call === 'copyFrom' ? before() : undefined) })
      const source = { objects: around(there, { before }), address }
      t.equal(await runOf('other', objects).adopt(source), true)
      const content = await contentOf(await RunStore.open(runOf('other')))
      t.ok(
        states.some((state) => JSON.stringify(state) === JSON.stringify(content)),
        `${script}: it is as it was at a moment`,
      )
      const named = new Set(content.checkpoints.map(({ checkpoint }: { checkpoint: string }) => checkpoint))
      const keys = [...(await all(here)).keys()].filter((key) => key.includes('/checkpoints/'))
      const folders = new Set(keys.map((key) => key.split('/')[3]))
      t.equal(folders.size, named.size, 'nothing else was left')
    }),
    { numRuns: 20, seed: 4 },
  )
})

t.test('a run that cannot be taken over leaves nothing', async (t) => {
  const { there, here, address, runOf } = places(t)
  const run = await RunStore.create(runOf('one'), 'r')
  await run.write(snapshot(1), nothing)
  let copies = 0
  const failing = around(here, {
    before: (call) => {
      if (call === 'copyFrom' && ++copies > 2) throw new StoreError('it is busy')
    },
  })
  const source = { objects: there, address }
  await t.rejects(runOf('other', failing).adopt(source), { name: 'StoreError', message: 'it is busy' })
  t.same([...(await all(here)).keys()], [])

  let step = 1
  const restless = around(there, {
    before: async (call) => {
      if (call === 'get') await run.write(snapshot(++step), nothing)
    },
  })
  const message = /one\/runs\/r\/ had other checkpoints 20 times in a row/
  await t.rejects(runOf('other').adopt({ objects: restless, address }), { name: 'StoreError', message })
  t.same([...(await all(here)).keys()], [])

  const half = 'runs/r/checkpoints/step-000000000001@1.99/manifest.json'
  await here.put(half, Buffer.from('what a service had copied when it died'))
  t.equal(await runOf('other', here, 2).adopt(source), true)
  t.equal(await here.size(half), undefined)
  await here.delete([...(await all(here)).keys()])

  await there.put('runs/r/run.json', Buffer.from('{}'))
  await t.rejects(runOf('other').adopt(source), { name: 'UnreadableError', message: /runs\/r\/run.json does not end/ })
})

t.test('a process goes on with the run of another one bit for bit, while that is alive', async (t) => {
  const reference = await startService()
  const traces: Trace[] = await undisturbed(reference, 6)
  await reference.app.close()
  const address = store.address()
  const place = (origin: string) => placeOf(origin, address)
  const start = (origin: string): Promise<Service> =>
    startService({ checkpoint_file_bytes: 2000, checkpoint_steps: 1, ...store.settings(placeOf(origin, address), 30) })
  const one = await start(ONE)
  const { client, traces: begun } = await train(one, { last: 3 })
  t.same(known(begun), known(traces.slice(0, 3)))
  await one.runs.keeper('r').settled()
  const other = await open(place, OTHER)
  t.equal(await other.adopt!('r', ONE), true)
  await other.close()

  const next = await start(OTHER)
  await next.restored
  t.match(next.runs.get('r'), { step: 3, digest: traces[2]!.digest })
  const { client: later, traces: ended } = await train(next, { last: 6, open: { mode: 'resume' } })
  t.same(known(ended), known(traces.slice(3)))
  t.equal(one.runs.get('r').step, 3, 'it is alive, and has nothing of that')
  for (const each of [client, later]) await each.close()
  await one.app.close()
  await next.app.close()
})

t.test('the store of a service of several processes finds the places of the others', async (t) => {
  const settings = {
    ...store.settings(store.address()),
    peers: `${ONE},${OTHER}`,
    advertise: OTHER,
    cluster_key: 'the-key-of-the-cluster',
  }
  const data = await openData(configOf(settings), createMetrics())
  t.equal(await data!.adopt!('none', ONE), false)
  await data!.close()
})
