import { type FileHandle, open } from 'node:fs/promises'
import { UnreadableError } from '../checkpoint/manifest.js'
import { type OpenFile, readBytes } from '../file-bytes.js'
import { listSegments, type Segment } from './journal.js'
import {
  type AppliedHead,
  type EndHead,
  type Head,
  MAGIC,
  PREFIX_BYTES,
  readHead,
  readPrefix,
} from './journal-format.js'

/** A gradient in a journal: its `bytes` bytes lie at byte `at` of the file. `label` names its record in messages. */
export type StoredGradient = AppliedHead & {
  path: string
  /** Opens what is at `path`. */
  open(): Promise<OpenFile>
  at: number
  bytes: number
  label: string
}

/** A finished step in a journal, with its gradients in the order in which they were applied. */
export type StoredStep = { step: number; gradients: StoredGradient[]; end: EndHead; label: string }

/** The bytes of a file behind its last finished step: an unfinished step, unless `damaged` says what is wrong there. */
export type Tail = { path: string; at: number; bytes: number; damaged?: string }

type RecordAt = { head: Head; at: number; payloadAt: number; payloadBytes: number; end: number }

/**
 * Reads the finished steps after `step`, in order. `tail` are the bytes behind the last one, which were never
 * acknowledged. Segments without such a step are not read: they are kept for `muond replay` alone.
 * Throws UnreadableError where a step is missing, where a record is damaged before the end of a finished step, and
 * where the checksum of a record is right and a field of it is not what it must be.
 */
export async function readJournal(folder: string, step: number): Promise<{ steps: StoredStep[]; tail?: Tail }> {
  const reading = readSteps(segmentsAfter(await listSegments(folder), step), step)
  const steps: StoredStep[] = []
  let read = await reading.next()
  for (; !read.done; read = await reading.next()) steps.push(read.value)
  return { steps, tail: read.value }
}

/** The segments that may have steps after `step`. */
export function segmentsAfter(segments: readonly Segment[], step: number): Segment[] {
  return segments.filter((_, i) => i + 1 === segments.length || segments[i + 1].first > step + 1)
}

/**
 * Reads the finished steps after `step` one at a time, and answers the bytes behind the last one. Throws as
 * `readJournal`.
 */
export async function* readSteps(
  segments: readonly Segment[],
  step: number,
): AsyncGenerator<StoredStep, Tail | undefined> {
  let tail: Tail | undefined
  let expected = step + 1
  for (const segment of segments) {
    if (tail?.damaged) throw new UnreadableError(`${tail.damaged}, and there are later steps in ${segment.path}`)
    const reading = readSegment(segment)
    try {
      let read = await reading.next()
      for (; !read.done; read = await reading.next()) {
        const stored = read.value
        if (stored.step <= step) continue
        if (stored.step !== expected)
          throw new UnreadableError(`${stored.label} ends step ${stored.step}, expected is step ${expected}`)
        expected += 1
        yield stored
      }
      tail = read.value
    } finally {
      // Who asks for no more steps, or is refused one, leaves no file open.
      await reading.return(undefined)
    }
  }
  return tail
}

/**
 * Cuts a file behind its last finished step, and waits for the disk: steps go on in another file, and a power cut
 * must not bring the tail back before them.
 */
export async function cutTail({ path, at }: Tail): Promise<void> {
  const file = await open(path, 'r+')
  try {
    await file.truncate(at)
    await file.datasync()
  } finally {
    await file.close()
  }
}

/** The finished steps of a segment; answers the bytes behind the last one. */
async function* readSegment({ path, bytes, file: known }: Segment): AsyncGenerator<StoredStep, Tail | undefined> {
  const file = known ?? (await open(path, 'r'))
  try {
    let gradients: StoredGradient[] = []
    let finishedAt = 0
    let at = 0
    for (let number = 1; at < bytes; number++) {
      const label = `${path}: record ${number} at byte ${at}`
      const record = await readRecord(file, { at, bytes, label })
      if (record === undefined) {
        await expectNoEnd(file, { from: at + 1, bytes, label })
        return { path, at: finishedAt, bytes: bytes - finishedAt, damaged: `${label} is damaged or cut off` }
      }
      const { head, payloadAt, payloadBytes, end } = record
      at = end
      if (head.type === 'gradient') {
        gradients.push({ ...head, path, open: () => open(path, 'r'), at: payloadAt, bytes: payloadBytes, label })
        continue
      }
      yield { step: head.step, gradients, end: head, label }
      gradients = []
      finishedAt = at
    }
    return finishedAt === bytes ? undefined : { path, at: finishedAt, bytes: bytes - finishedAt }
  } finally {
    if (file !== known) await file.close()
  }
}

/**
 * The record at byte `at` of a file of `bytes` bytes; undefined where no whole and undamaged one lies there. Throws
 * UnreadableError, which begins with `label`, for one that is undamaged and wrong.
 */
async function readRecord(
  file: FileHandle,
  { at, bytes, label }: { at: number; bytes: number; label: string },
): Promise<RecordAt | undefined> {
  const prefix = await readBytes(file, at, PREFIX_BYTES)
  const lengths = readPrefix(prefix)
  if (lengths === undefined) return undefined
  const payloadAt = at + PREFIX_BYTES + lengths.headBytes
  const end = payloadAt + lengths.payloadBytes
  if (end > bytes) return undefined
  const head = readHead(prefix, await readBytes(file, at + PREFIX_BYTES, lengths.headBytes), label)
  if (head?.type === 'end' && lengths.payloadBytes > 0)
    throw new UnreadableError(
      `${label}: the end of step ${head.step} has ${lengths.payloadBytes} bytes of payload, expected 0`,
    )
  return head && { head, at, payloadAt, payloadBytes: lengths.payloadBytes, end }
}

const SEARCH_BYTES = 4 << 20

/**
 * Searches behind a damaged record for the end of a step. A step with an end was acknowledged, and so was all before
 * it: throws UnreadableError, as the damaged record was not just being written.
 */
async function expectNoEnd(
  file: FileHandle,
  { from, bytes, label }: { from: number; bytes: number; label: string },
): Promise<void> {
  let at = from
  while (at < bytes) {
    const found = (await readBytes(file, at, SEARCH_BYTES)).indexOf(MAGIC)
    if (found < 0) {
      // The magic bytes may lie across the border of two pieces.
      at += SEARCH_BYTES - MAGIC.length + 1
      continue
    }
    const place = at + found
    const record = await readRecord(file, {
      at: place,
      bytes,
      label: `${label} is damaged; the record at byte ${place}`,
    })
    if (record?.head.type === 'end')
      throw new UnreadableError(`${label} is damaged, and step ${record.head.step} was finished after it`)
    at = record?.end ?? place + 1
  }
}
