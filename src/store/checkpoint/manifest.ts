import { createHash } from 'node:crypto'
import type { AttentionDescription, Contribution, ParameterDeclaration, ReceiptFrame } from '../../wire/frame.js'
import type { Rule } from '../rules.js'
import { manifestRule } from './manifest-rules.js'

/** The version of what stands in the files of a run. */
export const FORMAT = 1

/** A group: `given` are the hyperparameters that the client set, `hyperparameters` all that were in force. */
export type GroupRecord = {
  name: string
  algorithm: string
  preset?: string
  given: Readonly<Record<string, unknown>>
  hyperparameters: Readonly<Record<string, unknown>>
}

/** How a gradient was applied: its factors and fingerprints, which are 16 hexadecimal digits. */
export type AppliedRecord = {
  gradient_scale: number
  gradient_fingerprint: string
  update_fingerprint: string
  scale: number
  decay: number
  /** The replicas whose mean the gradient is, in order; left out where it is none. */
  contributors?: readonly ContributorRecord[]
}

/** A replica that a gradient is the mean of, and what it has sent. */
export type ContributorRecord = Contribution & { readonly fingerprint: string }

/**
 * A parameter: `count` updates were applied to it, the last one (`last`) in step `applied_step`. `gradient_square` is
 * the sum of squares of that step's gradient.
 */
export type PlaceRecord = { count: number; applied_step: number; gradient_square: number; last?: AppliedRecord }

/**
 * The settings of one step: every group, and the client's `step` frame. A logit of -Infinity, which JSON lacks, is
 * null.
 */
export type SettingsRecord = {
  groups: GroupRecord[]
  frame: {
    groups: Record<string, Record<string, unknown>>
    gradient_scale: number
    max_logits: Record<string, (number | null)[]>
  }
}

/**
 * State that was imported after the last finished step. The run's digest follows from that step's digest and
 * `hashes`, the SHA-256 of every state tensor of each parameter.
 */
export type ImportRecord = { step_digest: string; hashes: readonly (readonly string[])[] }

/** A parameter as it was declared, with its position among all. */
export type ParameterRecord = Omit<ParameterDeclaration, 'ranges'> & { readonly index?: number }

/** A run between two steps, without its tensors. */
export type RunRecord = {
  run: string
  created_at: string
  epoch: number
  /**
   * The last finished step. `digest` is of the state after it, or after an import that followed it; `previous_digest`
   * is of the state before it.
   */
  step: number
  digest: string
  previous_digest: string
  parameters: readonly ParameterRecord[]
  attentions: readonly AttentionDescription[]
  /** The groups of the next step. */
  groups: GroupRecord[]
  /** The settings of the last finished step: its replay computes with them. */
  last?: SettingsRecord
  receipt?: ReceiptFrame
  places: PlaceRecord[]
  imported?: ImportRecord
}

/** What computed a state. Two services with the same record compute the same bits. */
export type DeviceRecord = { kind: string; name: string; onnxruntime: string; processor: string }

/** A file of a checkpoint. */
export type FileRecord = { name: string; bytes: number; sha256: string }

/** The file `manifest.json` of a checkpoint; it is written last, so a checkpoint that has one is whole. */
export type Manifest = RunRecord & {
  format: number
  checkpoint: string
  tags: readonly string[]
  written_at: string
  server: string
  device: DeviceRecord
  /** The momentum_form of each group and the dtype of each tensor, for people: `groups` and the files say the same. */
  momentum_form: Record<string, unknown>
  dtypes: Record<string, string>
  bytes: number
  files: FileRecord[]
}

/** A file of a data folder is damaged or missing. The message names the file and both values, such as both hashes. */
export class UnreadableError extends Error {
  override readonly name = 'UnreadableError'
}

/** The text of a manifest. */
export function sealManifest(manifest: Manifest): string {
  return seal(manifest)
}

/**
 * Reads a manifest's text. Throws UnreadableError with both hashes where one byte was changed, and with the field
 * where one is not what it must be.
 */
export function openManifest(text: string, file: string): Manifest {
  return held(manifestRule, unseal(text, file), file)
}

/** The value, which a rule holds for. Throws UnreadableError that names the file, the field and both values. */
export function held<T>(rule: Rule<T>, value: unknown, file: string): T {
  const problem = rule.problem(value, '')
  if (problem === undefined) return value as T
  throw new UnreadableError(`${file}: ${problem}`)
}

const SEAL = ',\n  "sha256": "'

/** JSON with a key a line, whose last key is the SHA-256 of all the text before it. */
export function seal(record: object): string {
  const keys = Object.entries(record)
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => `  ${JSON.stringify(key)}: ${textOf(value)}`)
  const body = `{\n${keys.join(',\n')}`
  return `${body}${SEAL}${sha256(body)}"\n}\n`
}

/**
 * Reads what `seal` wrote, without its hash. Throws UnreadableError with both hashes where one byte is not what was
 * written, and for another format.
 */
export function unseal(text: string, file: string): { format: number } {
  const at = text.lastIndexOf(SEAL)
  const [, said] = /^([0-9a-f]{64})"\n}\n$/.exec(text.slice(at + SEAL.length)) ?? []
  if (at < 0 || said === undefined) {
    throw new UnreadableError(`${file} does not end with its SHA-256: it was cut off or written to`)
  }
  const actual = sha256(text.slice(0, at))
  if (actual !== said) throw new UnreadableError(`${file} has SHA-256 ${actual}, expected ${said}`)
  const { sha256: _, ...record }: { format: number; sha256: string } = JSON.parse(text)
  if (record.format === FORMAT) return record
  throw new UnreadableError(`${file} has format ${record.format}, this version reads ${FORMAT}`)
}

/** JSON of one line, but for a list of maps, which may be long: each map has a line. */
function textOf(value: unknown): string {
  if (!Array.isArray(value) || typeof value[0] !== 'object') return JSON.stringify(value)
  return `[\n${value.map((item) => `    ${JSON.stringify(item)}`).join(',\n')}\n  ]`
}

function sha256(text: string): string {
  return createHash('sha256').update(text).digest('hex')
}
