import { held, UnreadableError } from '../../checkpoint/manifest.js'
import { sealLine, unsealLine } from '../../checkpoint/sealed-line.js'
import type { OpenFile } from '../../file-bytes.js'
import {
  type EndHead,
  encodeHead,
  type Head,
  PREFIX_BYTES,
  readHead,
  readPrefix,
} from '../../journal/journal-format.js'
import type { StoredGradient, StoredStep } from '../../journal/journal-reader.js'
import { count, oneOf, optional, type Rule, record, text } from '../../rules.js'

// An entry of a journal is an object:
//   a head, a line of JSON that is filled up with spaces
//   of a finished step: the heads of its gradients' records and of its end, as in a file (journal-format.ts)
//   the gradients, one behind the other, unless they are in an object of their own, which the head names

/**
 * The head of an entry. `step`: a finished step of a branch. `fence`: a service has taken the run; one of before finds
 * the position taken, and can end no step. `clear`: the steps before it of a branch count no more.
 */
export type EntryHead = {
  readonly kind: 'step' | 'fence' | 'clear'
  /** Of the service that wrote it. */
  readonly generation: number
  readonly branch: number
  readonly step: number
  /** The bytes of the records' heads, and those of the gradients. */
  readonly records: number
  readonly gradients: number
  /** The object of the gradients, below the folder of the journal; undefined where they follow the records. */
  readonly data?: string | undefined
}

export const HEAD_BYTES = 512

const rule: Rule<EntryHead> = record<EntryHead>({
  kind: oneOf('step', 'fence', 'clear'),
  generation: count,
  branch: count,
  step: count,
  records: count,
  gradients: count,
  data: optional(text('the name of an object', /^data\/[\w.]+$/)),
})

export function encodeEntryHead(head: EntryHead): Buffer {
  return Buffer.from(`${sealLine(head).padEnd(HEAD_BYTES - 1)}\n`)
}

/** Throws UnreadableError, which begins with `label`. */
export function readEntryHead(bytes: Buffer, label: string): EntryHead {
  return held(rule, unsealLine(bytes.toString().trimEnd(), label), label)
}

/** Where the bytes of a step's gradients are, from byte `at` on. */
export type GradientsPlace = { path: string; at: number; open(): Promise<OpenFile> }

/** A step from the bytes of its records' heads. Throws UnreadableError, which begins with `label`. */
export function readStep(records: Buffer, { step }: EntryHead, place: GradientsPlace, label: string): StoredStep {
  const { path, open } = place
  const gradients: StoredGradient[] = []
  let payloadAt = place.at
  for (let at = 0, number = 1; at < records.length; number++) {
    const name = `${label}: record ${number}`
    const { head, payloadBytes, end } = readRecord(records, at, name)
    at = end
    if (head.step !== step) throw new UnreadableError(`${name} is of step ${head.step}, expected ${step}`)
    if (head.type === 'end') {
      if (end === records.length) return { step, gradients, end: head, label }
      throw new UnreadableError(`${name} ends step ${step}, and there are records behind it`)
    }
    gradients.push({ ...head, path, open, at: payloadAt, bytes: payloadBytes, label: name })
    payloadAt += payloadBytes
  }
  throw new UnreadableError(`${label} has no end of step ${step}`)
}

function readRecord(records: Buffer, at: number, label: string): { head: Head; payloadBytes: number; end: number } {
  const prefix = records.subarray(at, at + PREFIX_BYTES)
  const lengths = readPrefix(prefix)
  const end = at + PREFIX_BYTES + (lengths?.headBytes ?? 0)
  const head = lengths && readHead(prefix, records.subarray(at + PREFIX_BYTES, end), label)
  if (lengths && head) return { head, payloadBytes: lengths.payloadBytes, end }
  throw new UnreadableError(`${label} is damaged or cut off`)
}

/** The record of the end of a step. */
export function encodeEnd(end: EndHead): Buffer {
  return encodeHead(end, 0)
}
