import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import t, { type Test } from 'tap'
import { WholeFiles } from '../../../src/cluster/head/whole-files.js'
import { WholeObjects } from '../../../src/cluster/head/whole-objects.js'
import type { StoredLog, WholeStore } from '../../../src/cluster/head/whole-store.js'
import { S3Objects } from '../../../src/store/objects/s3/s3-objects.js'
import { TestStore } from '../../store/objects/stores.js'
import { beginAt, checkpointAt, entryAt, flipped, RECORD } from './wholes.js'

// What every place for wholes keeps to, in a folder and in S3.

const store = await TestStore.start(t)

/** A place, and the texts in it by their names. */
type Place = {
  wholes: WholeStore
  /** The place as it is after a restart, or to another process. */
  again(): WholeStore
  /** The texts whose names have this part. */
  names(part: string): Promise<string[]>
  get(name: string): Promise<Buffer>
  put(name: string, bytes: Buffer): Promise<void>
}

const KINDS: Record<string, (t: Test) => Place> = {
  'in a folder': (t) => {
    const data = t.testdir({})
    const again = () => new WholeFiles(data, true)
    const names = async (part: string) =>
      readdirSync(data, { recursive: true, withFileTypes: true })
        .filter((entry) => entry.isFile())
        .map((entry) => join(entry.parentPath, entry.name))
        .filter((name) => name.includes(part))
    const put = async (name: string, bytes: Buffer) => {
      mkdirSync(dirname(name), { recursive: true })
      writeFileSync(name, bytes)
    }
    return { wholes: again(), again, names, get: async (name) => readFileSync(name), put }
  },
  'in S3': () => {
    const address = store.address()
    const objects = new S3Objects(address, () => {})
    const again = () => new WholeObjects(new S3Objects(address, () => {}))
    const names = async (part: string) => {
      const found: string[] = []
      for await (const key of objects.list('')) if (key.includes(part)) found.push(key)
      return found
    }
    const get = async (key: string) => (await objects.get(key))!.bytes
    return { wholes: again(), again, names, get, put: (key, bytes) => objects.put(key, bytes) }
  },
}

const opened: StoredLog[] = []
t.afterEach(async () => {
  for (const log of opened.splice(0)) await log.close()
})

/** The whole that is there, with a log of so many entries. */
async function made({ wholes }: Place, entries = 0): Promise<StoredLog> {
  const { log } = await wholes.create(RECORD)
  opened.push(log)
  for (let position = 1; position <= entries; position++) await log.put(entryAt(position))
  return log
}

async function read(wholes: WholeStore) {
  const whole = await wholes.read('gpt')
  opened.push(whole.log)
  return whole
}

for (const [kind, open] of Object.entries(KINDS)) {
  t.test(`wholes ${kind}`, async (t) => {
    t.test('an entry is written where its position is free, and none is changed', async (t) => {
      const place = open(t)
      const log = await made(place, 2)
      t.same(await log.put(entryAt(1, 'another head')), entryAt(1))
      t.same(await log.put(entryAt(2, 'another head')), entryAt(2))
      t.same(await log.put(entryAt(2)), entryAt(2), 'the same again')
      await t.rejects(log.put(entryAt(4)), { name: 'RangeError', message: /entry 4 is put behind entry 2/ })
      const both = await Promise.all(['one', 'two'].map((head) => log.put(entryAt(3, head))))
      t.same(both, [entryAt(3, 'one'), entryAt(3, 'one')], 'of two at once one writes')
      const { log: later } = await read(place.again())
      for (const one of [log, later]) {
        t.same(await one.newest(), entryAt(3, 'one'))
        t.same(await one.read(1), entryAt(1))
        t.equal(await one.read(0), undefined)
        t.equal(await one.read(4), undefined)
      }
    })

    t.test('the newest entry is found, however many there are', async (t) => {
      const place = open(t)
      const log = await made(place)
      t.equal(await (await read(place.again())).log.newest(), undefined)
      for (let position = 1; position <= 20; position++) {
        await log.put(entryAt(position))
        t.same(await (await read(place.again())).log.newest(), entryAt(position))
      }
    })

    t.test('a whole is there as it was written, until it is removed', async (t) => {
      const place = open(t)
      const { wholes } = place
      t.same(await wholes.names(), [])
      t.equal(await wholes.has('gpt'), false)
      const none = { code: 'RUN_NOT_FOUND', message: /no run 'gpt' over several processes/ }
      await t.rejects(wholes.read('gpt'), none)
      await t.rejects(wholes.remove('gpt'), none)
      await t.rejects(wholes.keepCheckpoints('gpt', []), none)

      const log = await made(place, 1)
      await t.rejects(place.again().create(RECORD), { code: 'RUN_EXISTS', message: /run 'gpt' exists/ })
      t.same((await read(place.again())).checkpoints, [])
      const checkpoints = [checkpointAt(1), { ...checkpointAt(2), tag: 'best' }]
      t.same(await wholes.keepCheckpoints('gpt', checkpoints), checkpoints)
      const whole = await read(place.again())
      t.same({ ...whole, log: undefined }, { record: RECORD, checkpoints, log: undefined })
      t.same(await whole.log.newest(), entryAt(1))
      t.same([await place.again().names(), await place.again().has('gpt')], [['gpt'], true])
      t.same(await wholes.keepCheckpoints('gpt', checkpoints.slice(1)), checkpoints.slice(1))

      await log.close()
      await whole.log.close()
      await place.again().remove('gpt')
      await t.rejects(wholes.read('gpt'), none)
      await t.rejects(wholes.keepCheckpoints('gpt', checkpoints), none)
      t.same([await place.again().names(), await wholes.has('gpt')], [[], false])
      t.same(await place.names('checkpoints'), [])
      await made(place)
      const next = await read(place.again())
      t.same([next.checkpoints, await next.log.newest()], [[], undefined], 'another one has nothing of it')
    })

    t.test('one byte that is another one is never taken for what was written', async (t) => {
      const place = open(t)
      const log = await made(place, 3)
      await place.wholes.keepCheckpoints('gpt', [checkpointAt(1)])
      await log.close()
      const unreadable = { code: 'CHECKPOINT_UNREADABLE', message: /gpt/ }
      const damage = async (
        part: string,
        wrong: (text: Buffer) => Buffer,
        check: (name: string) => Promise<unknown>,
      ) => {
        const names = await place.names(part)
        const name = names.at(-1)!
        const text = await place.get(name)
        await place.put(name, wrong(text))
        await check(name)
        t.ok((await place.get(name)).equals(wrong(text)), 'what is there is left as it is')
        await place.put(name, text)
      }
      const refused = () => t.rejects(place.again().read('gpt'), unreadable)
      for (const wrong of [flipped, () => Buffer.alloc(0), () => Buffer.from('{}'), () => Buffer.from('null')]) {
        await damage('wholes', wrong, refused)
        await damage('checkpoints', wrong, refused)
      }
      await damage('wholes', flipped, async () => t.same(await place.again().names(), ['gpt'], 'it is there'))
      t.same(await (await read(place.again())).log.newest(), entryAt(3))
    })

    t.test('a log may have begun anew at any entry, and is removed with the whole', async (t) => {
      const place = open(t)
      const log = await made(place)
      const steps = [0, 1, 2, 2, 1, 2, 3, 3]
      for (const [i, step] of steps.entries()) {
        const isCommit = i > 0 && step === steps[i - 1]! + 1
        await log.put(isCommit ? { ...beginAt(i + 1, step, i), kind: 'commit' } : beginAt(i + 1, step))
      }
      await log.close()
      await place.again().remove('gpt')
      t.equal(await place.wholes.has('gpt'), false)
    })
  })
}
