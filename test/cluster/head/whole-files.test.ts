import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import t, { type Test } from 'tap'
import { FileLog } from '../../../src/cluster/head/file-log.js'
import { WholeFiles } from '../../../src/cluster/head/whole-files.js'
import { sealEntry, sealRecord } from '../../../src/cluster/head/whole-texts.js'
import { entryAt, flipped, RECORD } from './wholes.js'

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
  t.equal(readFileSync(path, 'utf8'), entries.map((entry) => `${sealEntry(entry)}\n`).join(''))
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
    t.equal(readFileSync(path, 'utf8'), `${written.slice(0, first)}${sealEntry(entryAt(2, 'the next head'))}\n`)
  }
  writeFileSync(path, written.slice(0, 1))
  t.equal(await (await logAt(path)).newest(), undefined)
})

t.test('a line that is not the entry of its position is never taken for one', async (t) => {
  const { path } = await logOf(t, 3)
  const [one, two, three] = readFileSync(path, 'utf8').split('\n')
  const unlike = sealEntry({ ...entryAt(2), step: -1 })
  for (const wrong of ['{}', 'null', '', two!.slice(1), one!, unlike, flipped(Buffer.from(two!)).toString()]) {
    writeFileSync(path, [one, two, wrong, ''].join('\n'))
    await t.rejects(FileLog.open(path, true), { name: 'UnreadableError', message: /log.jsonl': line 3/ }, wrong)
    writeFileSync(path, [one, wrong, three, ''].join('\n'))
    const log = await logAt(path)
    t.same(await log.newest(), entryAt(3), 'the newest one is enough to go on')
    const refusal = { code: 'CHECKPOINT_UNREADABLE', message: /log.jsonl': line 2/ }
    await t.rejects(log.read(2), refusal, wrong)
    await t.rejects(log.put(entryAt(2)), refusal)
  }
})

t.test('a log that is longer than what is read at a time has every line', async (t) => {
  const path = join(t.testdir(), 'log.jsonl')
  const lines = Array.from({ length: 3000 }, (_, i) => {
    return sealEntry({ ...entryAt(i + 1), shards: ['x'.repeat(1500)] })
  })
  writeFileSync(path, `${lines.join('\n')}\n`)
  const log = await logAt(path)
  for (const position of [1, 2, 1000, 2999, 3000]) t.match(await log.read(position), { position })
  t.match(await log.newest(), { position: 3000 })
  t.equal(await log.read(3001), undefined)
})

t.test('files that are not those of the whole are told', async (t) => {
  const data = t.testdir()
  const files = new WholeFiles(data, true)
  opened.push((await files.create(RECORD)).log as FileLog)
  const folder = join(data, 'wholes', 'gpt')
  const path = join(folder, 'whole.json')
  writeFileSync(path, sealRecord({ ...RECORD, run: 'other' }))
  const other = { code: 'CHECKPOINT_UNREADABLE', message: /^run 'gpt' in .*run is "other", expected 'gpt'/ }
  await t.rejects(files.read('gpt'), other)
  for (const file of ['whole.json', 'checkpoints.json']) {
    rmSync(join(folder, file), { force: true })
    mkdirSync(join(folder, file))
    await t.rejects(files.read('gpt'), { code: 'CHECKPOINT_UNREADABLE', message: /EISDIR/ })
    if (file === 'checkpoints.json') await t.rejects(files.keepCheckpoints('gpt', []), { code: 'STORAGE_FAILED' })
    rmSync(join(folder, file), { recursive: true })
    if (file === 'whole.json') writeFileSync(path, sealRecord(RECORD))
  }
})

t.test('a whole that was half made or half deleted is none', async (t) => {
  const data = t.testdir({ wholes: { '.half': { 'whole.json': '{}' }, '.empty': {} } })
  const files = new WholeFiles(data, false)
  const { log } = await files.create(RECORD)
  t.equal(log.isDurable, false)
  t.same(await files.names(), ['gpt'])
  t.same(readdirSync(join(data, 'wholes')), ['gpt'])
  await log.close()
})

t.test('a folder that cannot be used is told', async (t) => {
  const data = t.testdir({ wholes: { '.gpt': { 'log.jsonl': sealEntry(entryAt(1)) } } })
  const files = new WholeFiles(data, true)
  const long = { ...RECORD, run: 'x'.repeat(255) }
  await t.rejects(files.create(long), { code: 'STORAGE_FAILED', message: /run 'x+' cannot be kept: ENAMETOOLONG/ })
  const { log } = await files.create(RECORD)
  t.equal(await log.newest(), undefined, 'a whole begins without the log of one that was half deleted')
  await log.close()
  mkdirSync(join(data, 'wholes', '.gpt', 'more'), { recursive: true })
  await t.rejects(files.remove('gpt'), { code: 'STORAGE_FAILED', message: /run 'gpt' cannot be removed: ENOTEMPTY/ })
  const none = new WholeFiles(t.testdir({ wholes: 'no folder' }), true)
  await t.rejects(none.has('gpt'), { code: 'STORAGE_FAILED', message: /wholes' cannot be read: ENOTDIR/ })
  await t.rejects(none.create(RECORD), { code: 'STORAGE_FAILED' })
})
