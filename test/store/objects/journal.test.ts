import { randomUUID } from 'node:crypto'
import { join } from 'node:path'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { CheckpointFiles } from '../../../src/store/checkpoint/checkpoint-files.js'
import { RunFolder } from '../../../src/store/folder/run-folder.js'
import type { Journal } from '../../../src/store/journal/journal.js'
import { PREFIX_BYTES } from '../../../src/store/journal/journal-format.js'
import { cutTail } from '../../../src/store/journal/journal-reader.js'
import { FolderObjects } from '../../../src/store/objects/folder-objects.js'
import {
  type EntryHead,
  encodeEntryHead,
  HEAD_BYTES,
  readEntryHead,
} from '../../../src/store/objects/journal/journal-entry.js'
import { type Objects, StoreError } from '../../../src/store/objects/objects.js'
import { RunObjects } from '../../../src/store/objects/run-objects.js'
import type { RunMedium } from '../../../src/store/run-medium.js'
import { RunStore } from '../../../src/store/run-store.js'
import { seeded } from '../../reference.js'
import { turn } from '../../service.js'
import { end, gradient, payload, write } from '../journal/records.js'
import { snapshot } from '../snapshots.js'
import { around } from './around.js'

const files = new CheckpointFiles()
t.teardown(() => files.close())
const nothing = () => {}

/** A folder of objects that services with any generation have their runs in. */
function place(t: Test) {
  const root = `${t.testdir({})}/${randomUUID()}`
  const objects: Objects = new FolderObjects(root)
  let number = 0
  const run = (generation: number, seen: Objects = objects) =>
    new RunObjects({ objects: seen, files, generation, address: { kind: 'folder', root }, number: () => ++number }, 'r')
  const keys = async () => {
    const found: string[] = []
    for await (const key of objects.list('runs/r/journal/')) found.push(key)
    return found
  }
  return { objects, run, keys, source: { objects, address: { kind: 'folder', root } as const } }
}

/** Begins or goes on with the journal of a run that is after `step`. */
const journalOf = (store: RunStore, step: number) =>
  store.openJournal({ first: step + 1, what: 'the journal', checkpointed: store.newest?.step ?? 0 })

/** The steps of a run after its newest checkpoint, with the bytes of every gradient. */
async function stepsOf(store: RunStore) {
  const { steps, tail } = await store.readJournal(store.newest?.step ?? 0)
  if (tail) await cutTail(tail)
  const read: unknown[] = []
  for (const { step, gradients, end } of steps) {
    const contents = []
    for (const { open, at, bytes, parameter, applied } of gradients) {
      const file = await open()
      const { buffer, bytesRead } = await file.read(Buffer.alloc(bytes), 0, bytes, at)
      await file.close()
      contents.push({ parameter, applied, content: buffer.subarray(0, bytesRead).toString('hex') })
    }
    read.push({ step, gradients: contents, end })
  }
  return JSON.parse(JSON.stringify(read))
}

/** What becomes of a run with a journal, wherever that lies. */
class Kept {
  step = 0
  attempt = 0
  #generation = 1
  readonly #media: (generation: number) => RunMedium
  #store: RunStore
  #journal: Journal

  private constructor(media: (generation: number) => RunMedium, store: RunStore, journal: Journal) {
    this.#media = media
    this.#store = store
    this.#journal = journal
  }

  static async create(media: (generation: number) => RunMedium): Promise<Kept> {
    const store = await RunStore.create(media(1), 'r')
    const kept = new Kept(media, store, await journalOf(store, 0))
    await kept.checkpoint()
    return kept
  }

  async take(sizes: readonly number[]): Promise<void> {
    await write(this.#journal, this.step + 1, sizes, this.attempt)
    this.step += 1
  }

  async checkpoint(tags: string[] = []): Promise<void> {
    await this.#journal.rotate(this.step + 1)
    await this.#store.write(snapshot(this.step, { tags }), nothing)
    await this.#journal.drop(this.step)
    await this.#store.retain(1)
  }

  async back(): Promise<void> {
    const entry = this.#store.find('kept') ?? this.#store.newest!
    await this.#journal.close()
    await this.#store.goBack(entry)
    await this.#store.sweep()
    this.step = entry.step
    this.attempt += 1
    this.#journal = await journalOf(this.#store, this.step)
  }

  async clear(): Promise<void> {
    await this.checkpoint()
    await this.#journal.close()
    await this.#store.clearJournal()
    this.#journal = await journalOf(this.#store, this.step)
  }

  /** Ends, in order or not, and begins again. */
  async restart(): Promise<void> {
    await this.#journal.close()
    this.#store = await RunStore.open(this.#media(++this.#generation))
    await this.#store.sweep()
    this.#journal = await journalOf(this.#store, this.step)
  }

  close(): Promise<void> {
    return this.#journal.close()
  }

  async state() {
    const { identity, newest } = this.#store
    const { bytes } = this.#journal
    return {
      ...{ step: this.step, branch: identity.branch, newest: newest?.checkpoint, hasBytes: bytes > 0 },
      ...{ hasSteps: await this.#store.hasSteps(), steps: await stepsOf(this.#store) },
    }
  }
}

t.test('a journal of objects has what one in a folder has, whatever becomes of the run', async (t) => {
  const act = fc.oneof(
    { weight: 5, arbitrary: fc.array(fc.nat(300), { maxLength: 4 }) },
    { weight: 4, arbitrary: fc.constantFrom('checkpoint', 'tag', 'back', 'clear', 'restart') },
  )
  await fc.assert(
    fc.asyncProperty(fc.array(act, { maxLength: 14 }), async (script) => {
      const { run } = place(t)
      const folder = join(t.testdir({}), randomUUID(), 'r')
      const both = [await Kept.create(run), await Kept.create(() => new RunFolder(folder, files))]
      for (const one of script) {
        for (const kept of both) {
          if (Array.isArray(one)) await kept.take(one)
          else if (one === 'checkpoint' || one === 'tag') await kept.checkpoint(one === 'tag' ? ['kept'] : [])
          else await kept[one as 'back' | 'clear' | 'restart']()
        }
        const [objects, inFolder] = await Promise.all(both.map((kept) => kept.state()))
        // A segment of a file goes when all of it is in a checkpoint; before that it says that there may be steps.
        t.same({ ...objects, hasSteps: inFolder!.hasSteps }, inFolder, JSON.stringify(script))
        t.ok(objects!.hasSteps === inFolder!.hasSteps || !objects!.hasSteps)
      }
      for (const kept of both) await kept.close()
    }),
    { numRuns: 25, seed: 11 },
  )
})

t.test('what a service was told is there is there for the next one, and nothing comes behind that', async (t) => {
  await fc.assert(
    fc.asyncProperty(fc.integer({ min: 1 }), async (seed) => {
      const { run } = place(t)
      const random = seeded(seed)
      const before = async () => {
        for (let turns = Math.floor(random() ** 4 * 30); turns > 0; turns -= 1) await turn()
      }
      const store = await RunStore.create(run(1), 'r')
      await store.write(snapshot(0), nothing)
      const told: number[] = []
      const stopped = async () => {
        for (let step = 1; step <= 30; step++) {
          await before()
          await write(journal, step, [40, 7])
          told.push(step)
        }
      }
      const journal = await journalOf(store, 0)
      const ended = stopped().catch((error) => error)
      for (let late = 0; late < 3; late++) await before()
      const next = await RunStore.open(run(2))
      const first = (await stepsOf(next)).map(({ step }: { step: number }) => step)
      const going = await journalOf(next, first.length)
      await write(going, first.length + 1, [3])
      const error = await ended
      if (error) t.match(error, { code: 'STORAGE_FAILED', message: /was taken by another service, this one has gen/ })
      t.same(
        told.filter((step) => !first.includes(step)),
        [],
        'no step was told that the next one has not',
      )
      const last = (await stepsOf(await RunStore.open(run(3)))).map(({ step }: { step: number }) => step)
      t.same(last, [...first, first.length + 1])
    }),
    { numRuns: 20, seed: 3 },
  )
})

t.test('a step that may have been written is written again, and a run that goes back leaves it', async (t) => {
  const { run, objects } = place(t)
  let losses = 0
  const lossy = around(objects, {
    after: (call) => {
      if (call === 'putIfAbsent' && losses-- > 0) throw new StoreError('the answer is lost')
    },
  })
  const store = await RunStore.create(run(1, lossy), 'r')
  await store.write(snapshot(0), nothing)
  const journal = await journalOf(store, 0)
  await write(journal, 1, [5])
  losses = 1
  const failed = { code: 'STORAGE_FAILED', fields: { step: 2, retry_after_seconds: 1 } }
  const message = /^the journal cannot be written, step 2 is not finished: the answer is lost$/
  await t.rejects(write(journal, 2, [5], 1), { ...failed, message })
  t.equal(journal.holds(0), false)
  t.equal((await stepsOf(await RunStore.open(run(1), { tidy: false }))).length, 2, 'it may be there')
  await write(journal, 2, [9], 2)
  const [, second] = await stepsOf(await RunStore.open(run(1), { tidy: false }))
  t.equal(second.gradients[0].content, Buffer.from(payload(4, 0, 9)).toString('hex'))
  await store.write(snapshot(2), nothing)
  await journal.drop(2)
  losses = 1
  await t.rejects(write(journal, 3, [5]), { code: 'STORAGE_FAILED' })
  t.equal(await store.hasSteps(), true, 'what may be there is taken to be')
  await store.goBack(store.newest!)
  t.equal(store.identity.branch, 1)
  const anew = await journalOf(store, 2)
  await write(anew, 3, [8])
  const next = await RunStore.open(run(2))
  t.same((await stepsOf(next))[0].gradients[0].content, Buffer.from(payload(3, 0, 8)).toString('hex'))
  await t.rejects(write(anew, 4, [5]), { code: 'STORAGE_FAILED', message: /taken by another service/ })
})

t.test('the gradients of a large step are in an object of their own, which goes with the step', async (t) => {
  const { run, objects, keys } = place(t)
  const store = await RunStore.create(run(1), 'r')
  await store.write(snapshot(0), nothing)
  const journal = await journalOf(store, 0)
  const sizes = [3 << 20, 5 << 20, 1, 5 << 20, 9]
  await write(journal, 1, sizes)
  await write(journal, 2, [4])
  t.match(
    (await keys()).map((key) => key.split('/').slice(4).join('/')),
    ['000000000001', '000000000002', '000000000003', /^data\/2\.1\.1$/],
  )
  const [first] = await stepsOf(store)
  for (const [parameter, bytes] of sizes.entries()) {
    const expected = Buffer.from(payload(1, parameter, bytes)).toString('hex')
    t.ok(first.gradients[parameter].content === expected, `${bytes} bytes`)
  }
  // A step that was never finished, and what is left of it.
  for (const [parameter, bytes] of sizes.entries())
    await journal.append(gradient(3, parameter), payload(3, parameter, bytes))
  t.equal(journal.holds(4), true)
  await journal.close()
  t.equal((await keys()).length, 4)
  await objects.put((await keys())[3]!.replace('2.1.1', '9.1.9'), Buffer.from('of a service that has died'))
  const next = await RunStore.open(run(2))
  t.equal((await keys()).length, 5, 'a fence is there, and nothing of that')
  const going = await journalOf(next, 2)
  await going.drop(1)
  t.equal((await keys()).length, 3, 'the fences, and the step that is in no checkpoint')
  await going.drop(2)
  t.equal(going.bytes, 0)
})

t.test('a gradient or an end that cannot be written is told, and can be given again', async (t) => {
  const { run, objects, keys } = place(t)
  let failing = ''
  const busy = around(objects, {
    before: (call) => {
      if (call === failing) throw new StoreError('it is busy')
    },
  })
  const refusing: Objects = new Proxy(busy, {
    get: (target, name) => {
      if (name === 'upload' && failing === 'write')
        return (key: string, bytes: number) =>
          Object.assign(objects.upload(key, bytes), {
            write: async () => {
              throw new StoreError('a part is refused')
            },
            abort: async () => {
              throw new StoreError('nor can it be removed')
            },
          })
      return name === 'upload' ? objects.upload.bind(objects) : Reflect.get(target, name)
    },
  })
  const store = await RunStore.create(run(1, refusing), 'r')
  await store.write(snapshot(0), nothing)
  const journal = await journalOf(store, 0)
  const sizes = [9 << 20, 4]
  failing = 'write'
  await t.rejects(write(journal, 1, sizes), { code: 'STORAGE_FAILED', message: /a part is refused/ })
  failing = 'putIfAbsent'
  await t.rejects(write(journal, 1, sizes), { code: 'STORAGE_FAILED', message: /it is busy/ })
  failing = ''
  await journal.append(gradient(1, 0), payload(1, 0, 4))
  const lost = { code: 'STORAGE_FAILED', message: /the gradients of 1 parameters have to be sent again/ }
  await t.rejects(journal.commit(end(1), [0, 7]), lost)
  for (const step of [1, 2]) await write(journal, step, sizes)
  t.same(
    (await stepsOf(store)).map(({ step }: { step: number }) => step),
    [1, 2],
  )
  await store.clearJournal()
  t.equal(await store.hasSteps(), false)
  const left = (await keys()).map((key) => key.split('/').slice(4).join('/'))
  t.match(left, ['000000000001', '000000000004', /^data/], 'a fence, what says that they count no more, and garbage')
  await write(journal, 3, [1])
  await RunStore.open(run(2))
  t.equal((await keys()).length, 4, 'that is removed by who takes the run')
  await t.rejects(store.clearJournal(), { name: 'StoreError', message: /taken by another service/ })
})

t.test('what is not what was written is told', async (t) => {
  /** The entry of step 2 is made of what it was, and of that of step 1. */
  const damages: [message: RegExp, damage: (bytes: Buffer, before: Buffer) => Buffer][] = [
    [/000000000003 has SHA-256/, (bytes) => flip(bytes, 10)],
    [/000000000003 does not end with its SHA-256/, () => Buffer.alloc(HEAD_BYTES)],
    [/000000000003: generation is 0.5, expected a count/, (bytes) => changed(bytes, { generation: 0.5 })],
    [/000000000003: record 1 is damaged or cut off/, (bytes) => flip(bytes, HEAD_BYTES)],
    [/000000000003: record 1 is damaged or cut off/, (bytes) => flip(bytes, HEAD_BYTES + 40)],
    [/000000000003: record 2 is damaged or cut off/, (bytes) => flip(bytes, HEAD_BYTES + (recordsOf(bytes) >> 1))],
    [/000000000003 has no end of step 2/, (bytes) => changed(bytes, { records: firstOf(bytes) })],
    [/000000000003: record 2 ends step 2, and there are records behind it/, twice],
    [/000000000003 is step 3, expected is step 2/, (bytes) => changed(bytes, { step: 3 })],
    [/000000000003: record 1 is of step 1, expected 2/, (_, before) => changed(before, { step: 2 })],
  ]
  for (const [message, damage] of damages) {
    const { run, objects, keys } = place(t)
    const store = await RunStore.create(run(1), 'r')
    await store.write(snapshot(0), nothing)
    const journal = await journalOf(store, 0)
    for (const step of [1, 2]) await write(journal, step, [4])
    const [before, key] = (await keys()).slice(1)
    await objects.put(key!, damage((await objects.get(key!))!.bytes, (await objects.get(before!))!.bytes))
    const read = RunStore.open(run(2)).then((next) => next.readJournal(0))
    await t.rejects(read, { name: 'UnreadableError', message })
  }
  const { run, objects, keys } = place(t)
  const store = await RunStore.create(run(1), 'r')
  await store.write(snapshot(0), nothing)
  const journal = await journalOf(store, 0)
  for (const step of [1, 2, 3]) await write(journal, step, [4])
  await objects.delete([(await keys())[2]!])
  const missing = { name: 'UnreadableError', message: /000000000004 is step 3, expected is step 2/ }
  await t.rejects((await RunStore.open(run(2))).readJournal(0), missing)
})

t.test('a run is taken over with its journal, and one that is being taken over may go on', async (t) => {
  const { run, source } = place(t)
  const other = place(t)
  const store = await RunStore.create(run(1), 'r')
  await store.write(snapshot(0), nothing)
  const journal = await journalOf(store, 0)
  await write(journal, 1, [9 << 20])
  await write(journal, 2, [5])
  const before = await stepsOf(store)
  t.equal(await other.run(7).adopt(source), true)
  await write(journal, 3, [5])
  const taken = await RunStore.open(other.run(7))
  t.same(await stepsOf(taken), before)
  const going = await journalOf(taken, 2)
  await write(going, 3, [6])
  t.same((await stepsOf(await RunStore.open(other.run(8)))).length, 3)
  t.same((await stepsOf(store)).length, 3, 'each has its own')
})

const headOf = (bytes: Buffer) => readEntryHead(bytes.subarray(0, HEAD_BYTES), '')
const recordsOf = (bytes: Buffer) => headOf(bytes).records
/** The bytes of the first record's head. */
const firstOf = (bytes: Buffer) => PREFIX_BYTES + bytes.readUInt32LE(HEAD_BYTES + 4)

function flip(bytes: Buffer, at: number): Buffer {
  const wrong = Buffer.from(bytes)
  wrong[at]! ^= 1
  return wrong
}

/** An entry with another head, which has the right hash. */
function changed(bytes: Buffer, change: Partial<EntryHead>): Buffer {
  return Buffer.concat([encodeEntryHead({ ...headOf(bytes), ...change }), bytes.subarray(HEAD_BYTES)])
}

/** An entry that has all of its records twice. */
function twice(bytes: Buffer): Buffer {
  const records = recordsOf(bytes)
  const body = bytes.subarray(HEAD_BYTES, HEAD_BYTES + records)
  return Buffer.concat([encodeEntryHead({ ...headOf(bytes), records: 2 * records }), body, body])
}
