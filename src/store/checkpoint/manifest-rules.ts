import type { AttentionDescription, Contribution, ReceiptFrame, RowsDeclaration } from '../../wire/frame.js'
import {
  atLeastZero,
  bool,
  count,
  dictionary,
  finite,
  list,
  map,
  natural,
  nullable,
  oneOf,
  optional,
  type Rule,
  record,
  rule,
  sha256,
  text,
} from '../rules.js'
import { SAFETENSORS_DTYPES } from '../safetensors.js'
import { isCheckpointId } from './checkpoint-id.js'
import type {
  AppliedRecord,
  ContributorRecord,
  DeviceRecord,
  FileRecord,
  GroupRecord,
  ImportRecord,
  Manifest,
  ParameterRecord,
  PlaceRecord,
  SettingsRecord,
} from './manifest.js'

// What every value of a manifest must be. Its hash says who wrote it, and not that this was right.

/** Most characters of a tag. */
export const TAG_CHARACTERS = 128

export const checkpointIdRule = rule<string>(
  'the id of a checkpoint',
  (value) => typeof value === 'string' && isCheckpointId(value),
)

export const tagRule = rule<string>(
  `1 to ${TAG_CHARACTERS} characters that are no checkpoint's id`,
  (value) => typeof value === 'string' && value.length > 0 && value.length <= TAG_CHARACTERS && !isCheckpointId(value),
)

export const groupRule: Rule<GroupRecord> = record<GroupRecord>({
  name: text(),
  algorithm: text(),
  preset: optional(text()),
  given: map,
  hyperparameters: map,
})

const time = text('an RFC 3339 time', /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$/)
const fingerprint = text('16 hexadecimal digits', /^[0-9a-f]{16}$/)
const rows = record<RowsDeclaration>({ parameter: count, first_row: optional(count) })

const parameter = record<ParameterRecord>({
  index: optional(count),
  name: text(),
  shape: list(natural),
  group: text(),
  gradient_dtype: optional(text()),
  update_dtype: optional(text()),
  split: optional(list(natural)),
  heads: optional(natural),
  matrices: optional(text()),
})

const attention = record<AttentionDescription>({
  name: text(),
  threshold: atLeastZero,
  rule: text(),
  query_heads: natural,
  key_value_heads: natural,
  head_dim: optional(natural),
  nope_dim: optional(natural),
  rope_dim: optional(count),
  value_dim: optional(count),
  query: rows,
  key: rows,
  query_bias: optional(rows),
  key_bias: optional(rows),
})

/** The settings of a step, here and in a journal. */
export const settingsRule: Rule<SettingsRecord> = record<SettingsRecord>({
  groups: list(groupRule),
  frame: record<SettingsRecord['frame']>({
    groups: dictionary(map),
    gradient_scale: finite,
    max_logits: dictionary(list(nullable(finite))),
  }),
})

const contribution = { replica: count, weight: finite }

export const receiptRule: Rule<ReceiptFrame> = record<ReceiptFrame>({
  type: oneOf('receipt'),
  step: natural,
  replayed: bool,
  applied: count,
  skipped: count,
  gradient_norm: atLeastZero,
  groups: dictionary(map),
  clipped_heads: dictionary(count),
  max_logit: optional(finite),
  digest: sha256,
  durable: bool,
  seconds: record<ReceiptFrame['seconds']>({ receive: finite, queue: finite, compute: finite, send: finite }),
  contributors: optional(list(record<Contribution>(contribution))),
  contributed: optional(bool),
})

/** How a gradient was applied, here and in a journal. */
export const appliedRule: Rule<AppliedRecord> = record<AppliedRecord>({
  gradient_scale: finite,
  gradient_fingerprint: fingerprint,
  update_fingerprint: fingerprint,
  scale: finite,
  decay: finite,
  contributors: optional(list(record<ContributorRecord>({ ...contribution, fingerprint }))),
})

const place = record<PlaceRecord>({
  count,
  applied_step: count,
  gradient_square: atLeastZero,
  last: optional(appliedRule),
})

const device = record<DeviceRecord>({ kind: text(), name: text(), onnxruntime: text(), processor: text() })

/** Files lie in the checkpoint's own folder: a name that leads out of it is none. */
const file = record<FileRecord>({ name: text('the name of a file', /^\w[\w.-]*$/), bytes: count, sha256 })

const fields = record<Manifest>({
  format: count,
  checkpoint: checkpointIdRule,
  tags: list(tagRule),
  written_at: time,
  server: text(),
  device,
  run: text(),
  created_at: time,
  epoch: count,
  step: count,
  digest: sha256,
  previous_digest: sha256,
  parameters: list(parameter),
  attentions: list(attention),
  groups: list(groupRule),
  last: optional(settingsRule),
  receipt: optional(receiptRule),
  places: list(place),
  imported: optional(record<ImportRecord>({ step_digest: sha256, hashes: list(list(sha256)) })),
  momentum_form: dictionary(oneOf('ema', 'heavy_ball')),
  dtypes: dictionary(oneOf(...Object.keys(SAFETENSORS_DTYPES))),
  bytes: count,
  files: list(file),
})

/** The rule of a whole manifest: of each field, and of those that must agree with each other. */
export const manifestRule: Rule<Manifest> = {
  problem: (value, path) => fields.problem(value, path) ?? disagreement(value as Manifest),
}

function disagreement({ parameters, places, imported, files, bytes, step, receipt }: Manifest): string | undefined {
  const differs = (what: string, has: number, expected: number) =>
    has === expected ? undefined : `${what} ${has}, expected ${expected}`
  const sum = files.reduce((total, each) => total + each.bytes, 0)
  return (
    differs('the number of places is', places.length, parameters.length) ??
    differs('the number of imported.hashes is', imported?.hashes.length ?? parameters.length, parameters.length) ??
    differs('bytes is', bytes, sum) ??
    differs('receipt.step is', receipt?.step ?? step, step) ??
    differs('the last applied_step is', Math.max(step, ...later(places, step)), step)
  )
}

/** The steps of places that were applied after `step`: spread over the arguments of a call they must be few. */
function later(places: readonly PlaceRecord[], step: number): number[] {
  return places
    .map(({ applied_step }) => applied_step)
    .filter((applied) => applied > step)
    .slice(0, 1)
}
