import {
  type AttentionDeclaration,
  type AttentionDescription,
  type CheckpointedFrame,
  type CheckpointFrame,
  type ClientFrame,
  type Contribution,
  type DrainingFrame,
  type EndFrame,
  type ErrorFrame,
  type GradientFrame,
  type GradientsFrame,
  type GroupDeclaration,
  type Layout,
  type MemberDeclaration,
  type MemberStatus,
  type MembersFrame,
  type MovedFrame,
  OPEN_NAME,
  type OpenedFrame,
  type OpenFrame,
  type ParameterDeclaration,
  type ParameterDescription,
  type PlacedFrame,
  type PlacedShard,
  type Quorum,
  type ReceiptFrame,
  type RowsDeclaration,
  RUN_NAME,
  type ServerFrame,
  type ShardDeclaration,
  type Source,
  type StepFrame,
  type StepSeconds,
  TRACEPARENT,
  type TransportAnswer,
  type TransportOffer,
  type UpdateFrame,
  type UpdatesFrame,
} from './frame.js'
import type { MapSchema, Schema } from './schema.js'

const string: Schema = { is: 'string' }
const bool: Schema = { is: 'bool' }
const int: Schema = { is: 'int' }
const uint: Schema = { is: 'uint' }
const float: Schema = { is: 'float' }
const bin: Schema = { is: 'bin' }
const anything: Schema = { is: 'any' }
const hyperparameter: Schema = { is: 'hyperparameter' }

const list = (of: Schema): Schema => ({ is: 'list', of })
const dictionary = (of: Schema): Schema => ({ is: 'dictionary', of })
type NamedKeys<T> = keyof { [K in keyof T as string extends K ? never : K]: T[K] } & string
type RequiredKeys<T> = { [K in NamedKeys<T>]: undefined extends T[K] ? never : K }[NamedKeys<T>]
type RequiredSchemas<T> = Readonly<Record<RequiredKeys<T>, Schema>>
type OptionalSchemas<T> = Readonly<Record<Exclude<NamedKeys<T>, RequiredKeys<T>>, Schema>>

/** A map with exactly the keys of the type T: a key too many, too few or on the wrong side does not compile. */
const map = <T>(required: RequiredSchemas<T>, optional: OptionalSchemas<T>): MapSchema => ({
  is: 'map',
  required,
  optional,
})
/** What the service sends may gain keys within one protocol version, so a client lets them pass. */
const openMap = <T>(required: RequiredSchemas<T>, optional: OptionalSchemas<T>): MapSchema => ({
  ...map<T>(required, optional),
  rest: anything,
})

const layout: OptionalSchemas<Layout> = { split: list(int), heads: int, matrices: string }

const group: MapSchema = {
  ...map<GroupDeclaration>({ name: string }, { algorithm: string, preset: string }),
  rest: hyperparameter,
}

const parameter = map<ParameterDeclaration>(
  { name: string, shape: list(int), group: string },
  { gradient_dtype: string, update_dtype: string, ...layout, ranges: list(list(uint)) },
)

const rows = map<RowsDeclaration>({ parameter: uint }, { first_row: int })
const tensors = { query: rows, key: rows } as const
const biases = { query_bias: rows, key_bias: rows } as const
const dims = { head_dim: int, nope_dim: int, rope_dim: int, value_dim: int } as const
const defaulted = { threshold: float, rule: string, key_value_heads: int } as const

const attention = map<AttentionDeclaration>(
  { name: string, query_heads: int, ...tensors },
  { ...defaulted, ...dims, ...biases },
)

const offer: MapSchema = {
  ...map<TransportOffer>(
    { kind: string, nonce: bin },
    { process: uint, descriptors: list(uint), gpu: string, handles: list(bin) },
  ),
  // A kind that this service does not know is refused in `opened`, whatever it needs.
  rest: anything,
}

/**
 * Every frame that a client may send, with all its keys. An integer of a shape, a layout or an attention may be
 * negative here: the optimizer layer checks its value, and its error names the parameter.
 */
export const CLIENT_FRAMES: Readonly<Record<ClientFrame['type'], MapSchema>> = {
  open: map<OpenFrame>(
    { type: string, protocol: uint, run: { is: 'name', pattern: OPEN_NAME } },
    {
      mode: { is: 'name', pattern: /^(create|resume|create_or_resume)$/ },
      groups: list(group),
      parameters: list(parameter),
      attentions: list(attention),
      takeover: bool,
      checkpoint: string,
      from: map<Source>({ run: { is: 'name', pattern: RUN_NAME }, checkpoint: string }, {}),
      client: { is: 'name', pattern: /^.{0,256}$/su },
      transport: list(offer),
      member: map<MemberDeclaration>({ rank: uint, world_size: uint }, { replica: uint, replicas: uint }),
      quorum: map<Quorum>({ min_replicas: uint, deadline_seconds: float }, {}),
      weights: { is: 'name', pattern: /^[\x21-\x7e]{1,128}$/ },
      shards: uint,
      shard: map<ShardDeclaration>({ index: uint, generation: uint }, {}),
    },
  ),
  step: map<StepFrame>(
    { type: string, step: uint },
    {
      groups: dictionary(dictionary(hyperparameter)),
      gradient_scale: float,
      max_logits: dictionary(list(float)),
      traceparent: { is: 'name', pattern: TRACEPARENT },
    },
  ),
  gradient: map<GradientFrame>({ type: string, parameter: uint, step: uint, offset: uint, data: bin }, {}),
  gradients: map<GradientsFrame>({ type: string, step: uint, parameters: list(uint) }, {}),
  end: map<EndFrame>({ type: string, step: uint }, { skipped: list(uint), weight: float }),
  checkpoint: map<CheckpointFrame>({ type: string }, { tag: string }),
}

/** The schema of a parameter in `opened`. */
export const PARAMETER_DESCRIPTION = openMap<ParameterDescription>(
  {
    index: uint,
    name: string,
    shape: list(uint),
    group: string,
    gradient_dtype: string,
    update_dtype: string,
    step: uint,
    algorithm: string,
  },
  layout,
)

const attentionDescription = openMap<AttentionDescription>(
  { name: string, query_heads: int, ...tensors, ...defaulted },
  { ...dims, ...biases },
)

const memberStatus = openMap<MemberStatus>({ rank: uint, connected: bool }, { replica: uint })

const limits = openMap<OpenedFrame['limits']>({ chunk_bytes: uint }, {})
const server = openMap<OpenedFrame['server']>({ name: string, version: string, device: string }, {})

/** Every frame the service may send. */
export const SERVER_FRAMES: Readonly<Record<ServerFrame['type'], MapSchema>> = {
  opened: openMap<OpenedFrame>(
    {
      type: string,
      run: string,
      epoch: uint,
      step: uint,
      resumed: bool,
      digest: string,
      ahead: list(uint),
      attentions: list(attentionDescription),
      groups: dictionary(dictionary(hyperparameter)),
      limits,
      server,
    },
    {
      parameters: list(PARAMETER_DESCRIPTION),
      note: string,
      transport: openMap<TransportAnswer>(
        {
          kind: string,
          refused: list(openMap<TransportAnswer['refused'][number]>({ kind: string, reason: string }, {})),
        },
        {},
      ),
      member: openMap<MemberDeclaration>({ rank: uint, world_size: uint }, { replica: uint, replicas: uint }),
      members: list(memberStatus),
      quorum: openMap<Quorum>({ min_replicas: uint, deadline_seconds: float }, {}),
    },
  ),
  moved: openMap<MovedFrame>({ type: string, run: string, url: string }, {}),
  placed: openMap<PlacedFrame>(
    {
      ...{ type: string, run: string, generation: uint, step: uint, resumed: bool, digest: string },
      shards: list(
        openMap<PlacedShard>({ run: string, url: string, parameters: list(list(uint)) }, { checkpoint: string }),
      ),
      limits,
      server,
    },
    {},
  ),
  update: openMap<UpdateFrame>(
    { type: string, parameter: uint, step: uint, offset: uint },
    {
      scale: float,
      decay: float,
      row_scale: bin,
      replayed: bool,
      gradient_norm: float,
      update_rms: float,
      data: bin,
    },
  ),
  updates: openMap<UpdatesFrame>(
    {
      ...{ type: string, step: uint, replayed: bool, parameters: list(uint) },
      ...{ scale: list(float), decay: list(float), gradient_norm: list(float), update_rms: list(float) },
    },
    { row_scale: dictionary(bin) },
  ),
  receipt: openMap<ReceiptFrame>(
    {
      type: string,
      step: uint,
      replayed: bool,
      applied: uint,
      skipped: uint,
      gradient_norm: float,
      groups: dictionary(dictionary(hyperparameter)),
      clipped_heads: dictionary(uint),
      digest: string,
      durable: bool,
      seconds: openMap<StepSeconds>({ receive: float, queue: float, compute: float, send: float }, {}),
    },
    {
      max_logit: float,
      contributors: list(openMap<Contribution>({ replica: uint, weight: float }, {})),
      contributed: bool,
    },
  ),
  checkpointed: openMap<CheckpointedFrame>(
    { type: string, checkpoint: string, step: uint, digest: string, bytes: uint },
    {},
  ),
  error: openMap<ErrorFrame>(
    { type: string, code: string, message: string, status: uint, retryable: bool },
    { parameter: uint, step: uint, expected_step: uint, retry_after_seconds: float, left_out: bool },
  ),
  members: openMap<MembersFrame>({ type: string, members: list(memberStatus) }, {}),
  draining: openMap<DrainingFrame>({ type: string, deadline_seconds: float }, {}),
}
