import { FORMAT, held, seal, UnreadableError, unseal } from '../../store/checkpoint/manifest.js'
import { receiptRule } from '../../store/checkpoint/manifest-rules.js'
import { sealLine, unsealLine } from '../../store/checkpoint/sealed-line.js'
import { count, list, map, natural, oneOf, optional, type Rule, record, text } from '../../store/rules.js'
import type { AssignedShard } from '../assignment.js'
import type { Entry } from '../commit-log.js'
import type { WholeCheckpoint, WholeRecord } from './whole-store.js'

// What is kept of a whole, as texts. Each ends with the SHA-256 of what is before it: a byte that is another one than
// was written is an error. Every `open…` throws UnreadableError with `file` in front.

/** A declaration is parsed as that of a client is, by whoever uses it. */
const declarations = <T>(): Rule<T[]> => list<T>({ problem: map.problem })

export const recordRule: Rule<WholeRecord> = record<WholeRecord>({
  run: text(),
  created_at: text(),
  groups: declarations(),
  parameters: declarations(),
  attentions: declarations(),
  shards: list(record<AssignedShard>({ peer: text(), parameters: list(count) })),
})

type Checkpoints = { readonly format: number; readonly checkpoints: readonly WholeCheckpoint[] }

const checkpointsRule = record<Checkpoints>({
  format: count,
  checkpoints: list(
    record<WholeCheckpoint>({
      checkpoint: text(),
      tag: optional(text()),
      step: count,
      digest: text(),
      shards: list(text()),
    }),
  ),
})

export function sealCheckpoints(checkpoints: readonly WholeCheckpoint[]): string {
  return seal({ format: FORMAT, checkpoints })
}

export function openCheckpoints(content: string, file: string): readonly WholeCheckpoint[] {
  return held(checkpointsRule, unseal(content, file), file).checkpoints
}

type RecordFile = { readonly format: number; readonly record: WholeRecord }

const recordFileRule = record<RecordFile>({ format: count, record: recordRule })

export function sealRecord(whole: WholeRecord): string {
  return seal({ format: FORMAT, record: whole })
}

/** Throws UnreadableError for the record of another whole, too. */
export function openRecord(content: string, file: string, run: string): WholeRecord {
  return ofRun(held(recordFileRule, unseal(content, file), file).record, file, run)
}

/** The record, which must be that of the whole that its place is called after. */
export function ofRun(whole: WholeRecord, file: string, run: string): WholeRecord {
  if (whole.run === run) return whole
  throw new UnreadableError(`${file}: run is "${whole.run}", expected '${run}'`)
}

const entryRule = record<Entry>({
  position: natural,
  kind: oneOf('begin', 'commit'),
  generation: count,
  head: text(),
  step: count,
  digest: text(),
  shards: list(text()),
  receipt: optional(receiptRule),
})

/** An entry of a log as a line of JSON without its end, whose last key is the SHA-256 of the text before it. */
export function sealEntry(entry: Entry): string {
  return sealLine(entry)
}

/** Reads the entry of a position; `label` names the line or the object. */
export function openEntry(line: string, position: number, label: string): Entry {
  const entry = held(entryRule, unsealLine(line, label), label)
  if (entry.position === position) return entry
  throw new UnreadableError(`${label} has entry ${entry.position}, expected ${position}`)
}
