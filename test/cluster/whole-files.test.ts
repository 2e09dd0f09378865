import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import type { Entry } from '../../src/cluster/commit-log.js'
import { FileLog, type WholeCheckpoint, WholeFiles, type WholeRecord } from '../../src/cluster/head/whole-files.js'

const RECORD: WholeRecord = {
  run: 'gpt',
  created_at: '2026-01-01T00:00:00.000Z',
  groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
  parameters: [{ name: 'a', shape: [2], group: 'all' }],
  attentions: [],
  shards: [{ peer: 'http://127.0.0.1:8787', parameters: [0] }],
}

/** The entry of a position in the log of a head. */
function entryAt(position: number, head = 'the head'): Entry {
  const standing = { step: position, digest: `digest ${position}`, shards: [`shard ${position}`] }
  return { ...standing, position, kind: 'commit', generation: 1, head }
}

const opened: FileLog[] = []
t.afterEach(async () => {
  for (const log of opened.splice(0)) await log.close()
})

async function logAt(path: string): Promise<FileLog> {
  const log = await FileLog.open(path, true)
  opened.push(log)
  return log
}

async function logOf(t: Test, entries: number): Promise<{ path: string; log: FileLog }> {
  const path = join(t.testdir(), 'log.jsonl')
  const log = await logAt(path)
  for (let position = 1; position <= entries; position++) await log.put(entryAt(position))
  return { path, log }
}

t.test('a log writes an entry where its position is free, and changes none', async (t) => {
  const { path, log } = await logOf(t, 2)
  const written = readFileSync(path, 'utf8')
  t.same(await log.put(entryAt(1, 'another head')), entryAt(1))
  t.same(await log.put(entryAt(2, 'another head')), entryAt(2))
  await t.rejects(log.put(entryAt(4)), { name: 'RangeError', message: /entry 4 is put behind entry 2/ })
  t.equal(readFileSync(path, 'utf8'), written)
  const both = await Promise.all(['one', 'two'].map((head) => log.put(entryAt(3, head))))
  t.same(both, [entryAt(3, 'one'), entryAt(3, 'one')], 'of two at once one writes')
  for (const again of [log, await logAt(path)]) {
    t.same(await again.newest(), entryAt(3, 'one'))
    t.same(await again.read(1), entryAt(1))
    t.equal(await again.read(0), undefined)
    t.equal(await again.read(4), undefined)
  }
})

t.test('an entry that cannot be written does not count', async (t) => {
  const { path, log } = await logOf(t, 1)
  await log.close()
  await t.rejects(log.put(entryAt(2)), { code: 'STORAGE_FAILED', message: /log.jsonl' cannot be written/ })
  t.same(await log.newest(), entryAt(1))
  t.same(await (await logAt(path)).newest(), entryAt(1))
  opened.shift()
})

t.test('an entry of which one write takes only a part is written whole, or does not count', async (t) => {
  const { path, log } = await logOf(t, 1)
  const probe = await open(path)
  const prototype: FileHandle = Object.getPrototypeOf(probe)
  await probe.close()
  const { write } = prototype
  /** The disk has room for so many bytes more; one write takes seven of them. */
  let room = Number.POSITIVE_INFINITY
  const scanty = function (this: FileHandle, bytes: Uint8Array, at: number, length: number, position: number) {
    const part = Math.min(7, length, room)
    if (part === 0)
      return Promise.reject(Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' }))
    room -= part
    return Reflect.apply(write, this, [bytes, at, part, position])
  }
  t.intercept(prototype, 'write', { value: scanty })
  await log.put(entryAt(2))
  room = 20
  await t.rejects(log.put(entryAt(3)), { code: 'STORAGE_FAILED', message: /log.jsonl' cannot be written: ENOSPC/ })
  t.same(await log.newest(), entryAt(2))
  room = Number.POSITIVE_INFINITY
  await log.put(entryAt(3, 'another head'))
  const entries = [entryAt(1), entryAt(2), entryAt(3, 'another head')]
  t.equal(readFileSync(path, 'utf8'), entries.map((entry) => `${JSON.stringify(entry)}\n`).join(''))
  t.same(await (await logAt(path)).newest(), entries[2])
})

t.test('a last line that a crash has cut off is dropped, and its position is free', async (t) => {
  const { path } = await logOf(t, 2)
  const written = readFileSync(path, 'utf8')
  const first = written.indexOf('\n') + 1
  for (const length of [first, first + 1, written.length - 1]) {
    writeFileSync(path, written.slice(0, length))
    const log = await logAt(path)
    t.same(await log.newest(), entryAt(1))
    await log.put(entryAt(2, 'the next head'))
    t.equal(readFileSync(path, 'utf8'), `${written.slice(0, first)}${JSON.stringify(entryAt(2, 'the next head'))}\n`)
  }
  writeFileSync(path, written.slice(0, 1))
  t.equal(await (await logAt(path)).newest(), undefined)
})

t.test('a line that is not the entry of its position is never taken for one', async (t) => {
  const { path } = await logOf(t, 3)
  const [one, two, three] = readFileSync(path, 'utf8').split('\n')
  for (const wrong of ['{}', 'null', '', two!.slice(1), one!]) {
    writeFileSync(path, [one, two, wrong, ''].join('\n'))
    await t.rejects(FileLog.open(path, true), `the last one is ${wrong}`)
    writeFileSync(path, [one, wrong, three, ''].join('\n'))
    const log = await logAt(path)
    t.same(await log.newest(), entryAt(3))
    await t.rejects(log.read(2), { code: 'CHECKPOINT_UNREADABLE', message: /log.jsonl'/ }, `one before is ${wrong}`)
    await t.rejects(log.put(entryAt(2)), { code: 'CHECKPOINT_UNREADABLE' })
  }
})

t.test('a whole is read as it was written, or not at all', async (t) => {
  const data = t.testdir()
  const files = new WholeFiles(data, true)
  t.same(await files.names(), [])
  const made = await files.create(RECORD)
  opened.push(made.log)
  await made.log.put(entryAt(1))
  const checkpoints: WholeCheckpoint[] = [{ checkpoint: '1-1-0', step: 1, digest: 'digest 1', shards: ['step-1'] }]
  await files.keepCheckpoints('gpt', checkpoints)
  const read = await files.read('gpt')
  opened.push(read.log)
  t.same({ record: read.record, checkpoints: read.checkpoints }, { record: RECORD, checkpoints })
  t.same(await read.log.newest(), entryAt(1))

  const damage: [file: string, texts: string[]][] = [
    ['whole.json', ['', '{', 'null', '{}', JSON.stringify({ ...RECORD, run: 'other' })]],
    ['checkpoints.json', ['', '[', 'null', '{}', '[null]', '[{}]']],
    ['log.jsonl', ['{}\n', 'x\n', `${JSON.stringify(entryAt(2))}\n`]],
  ]
  for (const [file, texts] of damage) {
    const path = join(data, 'wholes', 'gpt', file)
    const intact = readFileSync(path)
    for (const text of texts) {
      writeFileSync(path, text)
      await t.rejects(files.read('gpt'), { code: 'CHECKPOINT_UNREADABLE', message: /^run 'gpt' in / }, file + text)
      t.equal(readFileSync(path, 'utf8'), text, 'what is there is left as it is')
    }
    writeFileSync(path, intact)
  }
  for (const file of ['whole.json', 'checkpoints.json']) {
    const path = join(data, 'wholes', 'gpt', file)
    rmSync(path)
    mkdirSync(path)
    await t.rejects(files.read('gpt'), { code: 'CHECKPOINT_UNREADABLE', message: /EISDIR/ })
    rmSync(path, { recursive: true })
    writeFileSync(path, file === 'whole.json' ? JSON.stringify(RECORD) : '[]')
  }
  await files.remove('gpt')
  await t.rejects(files.remove('gpt'), { code: 'STORAGE_FAILED', message: /the folder of run 'gpt' cannot be removed/ })
  await t.rejects(files.read('gpt'), { code: 'CHECKPOINT_UNREADABLE', message: /ENOENT/ })
  await t.rejects(files.keepCheckpoints('gpt', []), { code: 'STORAGE_FAILED', message: /checkpoints of run 'gpt'/ })
})

t.test('a whole that was half made or half deleted is none', async (t) => {
  const data = t.testdir({ wholes: { '.half': { 'whole.json': '{}' }, '.empty': {} } })
  const files = new WholeFiles(data, false)
  const { log } = await files.create(RECORD)
  opened.push(log)
  t.equal(log.isDurable, false)
  t.same(await files.names(), ['gpt'])
  t.same(readdirSync(join(data, 'wholes')), ['gpt'])
  await t.rejects(files.create(RECORD), { code: 'STORAGE_FAILED', message: /run 'gpt' cannot be kept/ })
})

t.test(
  'a whole begins without the log of one of its name that was deleted, and of which files were left',
  async (t) => {
    const data = t.testdir({ wholes: { '.gpt': { 'log.jsonl': `${JSON.stringify(entryAt(1))}\n` } } })
    const { log } = await new WholeFiles(data, true).create(RECORD)
    opened.push(log)
    t.equal(await log.newest(), undefined)
  },
)
