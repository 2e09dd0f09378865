import { createHash } from 'node:crypto'
import {
  appendFileSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'
import t, { type Test } from 'tap'
import { UnreadableError } from '../../../src/store/checkpoint/manifest.js'
import { clearJournal, FileJournal, listSegments } from '../../../src/store/journal/journal.js'
import { encodeHead, type Head, PREFIX_BYTES } from '../../../src/store/journal/journal-format.js'
import { cutTail, readJournal, readSteps, type StoredStep } from '../../../src/store/journal/journal-reader.js'
import { changed, wrongFields } from '../wrong-fields.js'
import { digestOf, end, gradient, payload, write } from './records.js'

const SIZES = [[3, 70], [0, 1, 200], [64]]

/** The files of a folder that this process has open. */
const openIn = (folder: string) =>
  readdirSync('/proc/self/fd').flatMap((descriptor) => {
    const link = join('/proc/self/fd', descriptor)
    const path = existsSync(link) ? readlinkSync(link) : ''
    return path.startsWith(folder) ? [path] : []
  })
const open = (folder: string, first = 1) => FileJournal.open(folder, { first, what: 'the journal', checkpointed: 0 })

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
    digest: digestOf(i + 1),
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
  await journal.drop(1, 0)
  const [, ...later] = await listSegments(folder)
  t.same(
    later.map(({ first }) => first),
    [2, 3],
    'the segment of a step that a checkpoint has stays where it is asked for',
  )
  t.equal(
    journal.bytes,
    later.reduce((sum, { bytes }) => sum + bytes, 0),
    'and is not counted',
  )
  t.same((await readJournal(folder, 1)).steps.length, 2)
  await journal.drop(1)
  t.same(
    (await listSegments(folder)).map(({ first }) => first),
    [2, 3],
  )
  const files = openIn(folder)
  await t.rejects(readJournal(folder, 0), { message: /ends step 2, expected is step 1$/ })
  const reading = readSteps(await listSegments(folder), 1)
  t.match(await reading.next(), { value: { step: 2 } })
  await reading.return(undefined)
  t.same(openIn(folder), files, 'who reads no further leaves no file open')
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

const GROUP = { name: 'g', algorithm: 'adamw', preset: 'torch', given: {}, hyperparameters: {} }
/** Both heads with every field that they may have. */
const FULL: readonly Head[] = [
  gradient(1, 0),
  {
    ...end(1),
    skipped: [1],
    settings: {
      groups: [GROUP],
      frame: { groups: { g: { lr: 1 } }, gradient_scale: 0.5, max_logits: { a: [null, 5] } },
    },
    receipt: { ...end(1).receipt, skipped: 1, groups: { g: {} }, clipped_heads: { a: 1 }, max_logit: 5 },
  },
]
/** Values that a field may have although they look wrong: those of hyperparameters, factors and logits, times. */
const isRight = (path: string, value: unknown) =>
  /groups\.g\./.test(path) ||
  (/scale|decay|max_logit|seconds/.test(path) && (value === -1.5e308 || (value === null && /max_logits/.test(path))))

/** A folder whose journal has these records; a head may be any value. */
function journalOf(t: Test, records: readonly { head: unknown; bytes?: number }[]): string {
  const folder = t.testdir({})
  const encoded = records.flatMap(({ head, bytes = 0 }) => [encodeHead(head as Head, bytes), new Uint8Array(bytes)])
  writeFileSync(join(folder, '000000000001.journal'), Buffer.concat(encoded))
  return folder
}

t.test('each field of a head is of its type and in its range, whatever the checksum says', async (t) => {
  const whole = await readJournal(
    journalOf(
      t,
      FULL.map((head) => ({ head })),
    ),
    0,
  )
  t.match(whole, { steps: [{ step: 1, end: FULL[1]! }], tail: undefined })
  for (const head of FULL) {
    for (const { path, value, record } of wrongFields(head, isRight)) {
      const spelled = path.replace(/[.[\]]/g, '\\$&')
      await t.rejects(
        readJournal(journalOf(t, [{ head: record }]), 0),
        { name: 'UnreadableError', message: new RegExp(`\\.journal: record 1 at byte 0: ${spelled} is `) },
        `${path} ${JSON.stringify(value)}`,
      )
    }
  }
})

t.test('a head that lacks a field or has another, or whose fields do not agree, is refused by name', async (t) => {
  const { digest: _, ...lacking } = end(1)
  const cases: [unknown, string][] = [
    [lacking, 'digest is undefined, expected a SHA-256 in hexadecimal'],
    [{ ...end(1), other: 1 }, 'other is unknown'],
    [{ ...gradient(1, 0), other: 1 }, 'other is unknown'],
    [changed(gradient(1, 0), ['applied', 'other'], () => 1), 'applied.other is unknown'],
    [{ ...end(1), type: 'start' }, 'type is "start", expected "gradient" or "end"'],
    [7, 'the head is 7, expected a map'],
    [null, 'the head is null, expected a map'],
    [{ ...gradient(0, 0) }, 'step is 0, expected a count above 0'],
    [{ ...end(2), step: 1 }, 'receipt.step is 2, expected 1'],
    [{ ...end(1), digest: digestOf(2) }, `receipt.digest is ${digestOf(1)}, expected ${digestOf(2)}`],
    [{ ...end(1), skipped: [1, 1, 0] }, 'receipt.skipped is 0, expected 2'],
  ]
  for (const [head, problem] of cases) {
    const error = await readJournal(journalOf(t, [{ head }]), 0).catch((error) => error)
    t.ok(error instanceof UnreadableError, problem)
    t.ok(error.message.endsWith(`record 1 at byte 0: ${problem}`), error.message)
  }
})

t.test('a wrong record is refused wherever it stands, also where it would be a tail', async (t) => {
  const wrong = { ...gradient(2, 0), parameter: -1 }
  const first = [{ head: gradient(1, 0), bytes: 3 }, { head: end(1) }]
  await t.rejects(readJournal(journalOf(t, [...first, { head: wrong, bytes: 3 }]), 0), {
    message: /: record 3 at byte \d+: parameter is -1, expected a count$/,
  })
  await t.rejects(readJournal(journalOf(t, [...first, { head: end(2), bytes: 3 }]), 0), {
    message: /: record 3 at byte \d+: the end of step 2 has 3 bytes of payload, expected 0$/,
  })
  // Behind a damaged record the end of a step is searched for: what is found there must be right, too.
  const folder = journalOf(t, [...first, { head: wrong, bytes: 3 }])
  const bytes = readFileSync(segmentOf(folder))
  bytes[PREFIX_BYTES]! ^= 1
  writeFileSync(segmentOf(folder), bytes)
  await t.rejects(readJournal(folder, 0), { name: 'UnreadableError' })
  const unparsed = Buffer.from('{"type"')
  const record = encodeHead(end(1), 0).subarray(0, PREFIX_BYTES)
  record.writeUInt32LE(unparsed.length, 4)
  const sum = createHash('sha256').update(record.subarray(4, 16)).update(unparsed).digest()
  sum.copy(record, 16, 0, 8)
  writeFileSync(segmentOf(folder), Buffer.concat([record, unparsed]))
  await t.rejects(readJournal(folder, 0), { message: /: record 1 at byte 0: the head is no JSON: / })
})
