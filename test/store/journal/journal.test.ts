import {
  appendFileSync,
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import t from 'tap'
import { UnreadableError } from '../../../src/store/checkpoint/manifest.js'
import { clearJournal, Journal, listSegments } from '../../../src/store/journal/journal.js'
import { type AppliedHead, type EndHead, encodeHead } from '../../../src/store/journal/journal-format.js'
import { cutTail, readJournal, type StoredStep } from '../../../src/store/journal/journal-reader.js'

const APPLIED = {
  gradient_scale: 1,
  gradient_fingerprint: '0'.repeat(16),
  update_fingerprint: '1'.repeat(16),
  scale: -1,
  decay: 0,
}
const gradient = (step: number, parameter: number): AppliedHead => ({
  type: 'gradient',
  step,
  parameter,
  applied: APPLIED,
})
const payload = (step: number, parameter: number, bytes: number) => new Uint8Array(bytes).fill(step * 10 + parameter)
const end = (step: number): EndHead => ({
  type: 'end',
  step,
  digest: `digest ${step}`,
  skipped: [],
  settings: { groups: [], frame: { groups: {}, gradient_scale: 1, max_logits: {} } },
  receipt: {
    ...{
      type: 'receipt',
      step,
      replayed: false,
      applied: 1,
      skipped: 0,
      gradient_norm: 1,
      groups: {},
      clipped_heads: {},
    },
    ...{ digest: `digest ${step}`, durable: true, seconds: { receive: 0, queue: 0, compute: 0, send: 0 } },
  },
})
const SIZES = [[3, 70], [0, 1, 200], [64]]

const open = (folder: string, first = 1) => Journal.open(folder, { first, what: 'the journal' })

async function write(journal: Journal, step: number, sizes: readonly number[]): Promise<void> {
  for (const [parameter, bytes] of sizes.entries())
    void journal.append(gradient(step, parameter), payload(step, parameter, bytes))
  await journal.commit(end(step), [...sizes.keys()])
}

/** Three steps in one segment, and the byte at which each of them ends. */
async function three(folder: string): Promise<number[]> {
  const journal = await open(folder)
  const ends: number[] = []
  for (const [i, sizes] of SIZES.entries()) {
    await write(journal, i + 1, sizes)
    ends.push(journal.bytes)
  }
  await journal.close()
  return ends
}

const segmentOf = (folder: string) => join(folder, readdirSync(folder)[0]!)

function contents({ step, gradients, end: { digest } }: StoredStep) {
  const bytes = gradients.map(({ path, at, bytes }) =>
    readFileSync(path)
      .subarray(at, at + bytes)
      .toString('hex'),
  )
  return { step, digest, parameters: gradients.map(({ parameter }) => parameter), bytes }
}
const expected = (steps: number) =>
  SIZES.slice(0, steps).map((sizes, i) => ({
    step: i + 1,
    digest: `digest ${i + 1}`,
    parameters: [...sizes.keys()],
    bytes: sizes.map((bytes, parameter) => Buffer.from(payload(i + 1, parameter, bytes)).toString('hex')),
  }))

t.test('steps come back as they were written, those after a checkpoint only', async (t) => {
  const folder = t.testdir({})
  await three(folder)
  const { steps, tail } = await readJournal(folder, 0)
  t.equal(tail, undefined)
  t.same(steps.map(contents), expected(3))
  t.same((await readJournal(folder, 2)).steps.map(contents), expected(3).slice(2))
  t.same(await readJournal(folder, 3), { steps: [], tail: undefined })
})

t.test('a folder that is not there is a journal without steps', async (t) => {
  t.same(await readJournal(join(t.testdir({}), 'nowhere'), 0), { steps: [], tail: undefined })
})

t.test('a journal that is cut off anywhere has the steps that are whole, and can be gone on with', async (t) => {
  const folder = t.testdir({ whole: {}, cut: {} })
  const ends = await three(join(folder, 'whole'))
  const cut = join(folder, 'cut')
  const whole = segmentOf(join(folder, 'whole'))
  for (let length = 0; length < ends[2]!; length++) {
    await clearJournal(cut)
    copyFileSync(whole, join(cut, '000000000001.journal'))
    truncateSync(segmentOf(cut), length)
    const finished = ends.filter((at) => at <= length).length
    const { steps, tail } = await readJournal(cut, 0)
    t.same(steps.map(contents), expected(finished), `${length} bytes`)
    const at = finished === 0 ? 0 : ends[finished - 1]!
    if (length === at) t.equal(tail, undefined)
    else t.match(tail, { at, bytes: length - at })
    if (tail) await cutTail(tail)
    if (length % 37 > 0) continue
    const journal = await open(cut, finished + 1)
    await write(journal, finished + 1, [5])
    await journal.close()
    const after = await readJournal(cut, 0)
    t.same(
      after.steps.map(({ step }) => step),
      Array.from({ length: finished + 1 }, (_, i) => i + 1),
    )
  }
})

t.test('one damaged byte is an error that names the record, or a tail; it is never another step', async (t) => {
  const folder = t.testdir({ whole: {}, damaged: {} })
  const ends = await three(join(folder, 'whole'))
  const bytes = readFileSync(segmentOf(join(folder, 'whole')))
  const lastEnd = ends[2]! - encodeHead(end(3), 0).length
  const path = join(folder, 'damaged', '000000000001.journal')
  await fc.assert(
    fc.asyncProperty(fc.nat(bytes.length - 1), fc.integer({ min: 1, max: 255 }), async (at, change) => {
      const damaged = Buffer.from(bytes)
      damaged[at]! ^= change
      writeFileSync(path, damaged)
      const read = await readJournal(join(folder, 'damaged'), 0).catch((error) => error)
      if (read instanceof UnreadableError) {
        t.match(read.message, /record \d+ at byte \d+ is damaged, and step \d was finished after it$/)
        t.ok(at < lastEnd, 'a step was finished after it')
        return
      }
      const { steps, tail } = read as Awaited<ReturnType<typeof readJournal>>
      // Only the fingerprint tells whether a gradient's bytes were changed.
      t.same(
        steps.map(({ step }) => step),
        tail ? [1, 2] : [1, 2, 3],
      )
      t.equal(tail !== undefined, at >= lastEnd)
      if (tail) t.match(tail, { at: ends[1], damaged: /is damaged or cut off$/ })
    }),
    { numRuns: 300, seed: 3 },
  )
})

t.test('the search for a step behind a damaged record crosses the pieces that it reads', async (t) => {
  const folder = t.testdir({})
  const journal = await open(folder)
  // Both gradients have bytes that look like the beginning of a record.
  const first = payload(1, 0, 2 ** 22 - 300)
  first.set(Buffer.from('MJ1\nMJ1\n'), 1000)
  void journal.append(gradient(1, 0), first)
  void journal.append(gradient(1, 1), Buffer.from('MJ1\nMJ1\n'.repeat(60)))
  await journal.commit(end(1), [0, 1])
  await write(journal, 2, [2 ** 22 + 11])
  await journal.close()
  const path = segmentOf(folder)
  const bytes = readFileSync(path)
  bytes[5]! ^= 1
  writeFileSync(path, bytes)
  await t.rejects(readJournal(folder, 0), {
    message: /record 1 at byte 0 is damaged, and step 1 was finished after it$/,
  })
})

t.test('segments follow each other; the old ones are dropped, and what is missing is told', async (t) => {
  const folder = t.testdir({})
  const journal = await open(folder)
  await write(journal, 1, [1])
  await journal.rotate(2)
  await journal.rotate(2)
  await write(journal, 2, [2])
  // Records that are appended before the rotation is done keep their order all the same.
  const rotated = journal.rotate(3)
  const appended = journal.append(gradient(3, 0), payload(3, 0, 9))
  await rotated
  await appended
  await journal.commit(end(3), [0])
  t.same(
    (await listSegments(folder)).map(({ first }) => first),
    [1, 2, 3],
  )
  t.same(
    (await readJournal(folder, 0)).steps.map(({ step }) => step),
    [1, 2, 3],
  )
  t.equal(
    journal.bytes,
    (await listSegments(folder)).reduce((sum, { bytes }) => sum + bytes, 0),
  )
  await journal.drop(1)
  t.same(
    (await listSegments(folder)).map(({ first }) => first),
    [2, 3],
  )
  await t.rejects(readJournal(folder, 0), { message: /ends step 2, expected is step 1$/ })
  t.same(
    (await readJournal(folder, 1)).steps.map(({ step }) => step),
    [2, 3],
  )
  await journal.close()
  appendFileSync(join(folder, '000000000002.journal'), 'damage')
  await t.rejects(readJournal(folder, 1), {
    message: /is damaged or cut off, and there are later steps in .*3\.journal$/,
  })
})

t.test('a step whose gradients were not all appended is not ended', async (t) => {
  const folder = t.testdir({})
  const journal = await open(folder)
  await journal.append(gradient(1, 0), payload(1, 0, 5))
  t.ok(journal.holds(0))
  await t.rejects(journal.commit(end(1), [0, 1, 2]), {
    code: 'STORAGE_FAILED',
    message:
      'the journal cannot be written, step 1 is not finished: the gradients of 2 parameters have to be sent again',
    fields: { step: 1, retry_after_seconds: 1 },
  })
  t.notOk(journal.holds(0), 'all of it has to be appended again')
  t.equal(journal.bytes, 0)
  await write(journal, 1, [5, 6, 7])
  await journal.close()
  t.same(
    (await readJournal(folder, 0)).steps.map(({ step }) => step),
    [1],
  )
})

t.test('large gradients are handed to the disk while the step goes on', async (t) => {
  const folder = t.testdir({})
  const journal = await open(folder)
  await write(journal, 1, [20 << 20, 20 << 20, 1])
  await write(journal, 2, [1])
  await journal.close()
  const { steps } = await readJournal(folder, 0)
  t.same(
    steps.map(({ gradients }) => gradients.map(({ bytes }) => bytes)),
    [[20 << 20, 20 << 20, 1], [1]],
  )
})

t.test('more records than one call of the system takes are written in their order', async (t) => {
  const folder = t.testdir({})
  const journal = await open(folder)
  await write(
    journal,
    1,
    Array.from({ length: 1000 }, (_, i) => i % 7),
  )
  await journal.close()
  const [step] = (await readJournal(folder, 0)).steps
  t.same(
    step!.gradients.map(({ parameter }) => parameter),
    [...Array(1000).keys()],
  )
})

t.test('a head that claims more than a head may have is no record', async (t) => {
  const folder = t.testdir({})
  await three(folder)
  const record = encodeHead(gradient(4, 0), 0)
  record.writeUInt32LE(2 ** 31, 4)
  appendFileSync(segmentOf(folder), record)
  t.match(await readJournal(folder, 0), { steps: [{}, {}, {}], tail: { damaged: /damaged/ } })
})

t.test('a segment that cannot be begun leaves the one before in use', async (t) => {
  const folder = t.testdir({})
  const journal = await open(folder)
  await write(journal, 1, [3])
  mkdirSync(join(folder, '000000000002.journal'))
  await t.rejects(journal.rotate(2), { code: 'EISDIR' })
  await write(journal, 2, [4])
  await journal.close()
  t.match(readFileSync(join(folder, '000000000001.journal'), 'latin1'), /"step":2/)
})
