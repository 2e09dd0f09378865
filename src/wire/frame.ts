import type { ErrorCode } from '../errors.js'

/** The only protocol version there is; `open` names it. */
export const PROTOCOL = 1

/** Most bytes of all that is not `data` in one frame. */
export const OTHER_KEYS_BYTES = 64 * 1024

/**
 * Most bytes of a `step` or an `end`. A `step` has a number of nine bytes for each query head, of which DeepSeek-V3 has
 * 7808; an `end` up to five bytes for each skipped parameter, and a run may have 100,000.
 */
export const STEP_BYTES = 1024 * 1024

/** Most bytes of an `open`, whose lists grow with the model. */
export const OPEN_BYTES = 16 * 1024 * 1024

/** Most bytes of any message: `open` and the `data` of a chunk have at most 16 MiB each, other keys come on top. */
export const MESSAGE_BYTES = OPEN_BYTES + OTHER_KEYS_BYTES

/** The W3C's `traceparent`, version 00: the ids of a trace and of a span, neither of them all zeros, and flags. */
export const TRACEPARENT = /^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$/

export const RUN_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/

/** A run's name, or that of a shard of it: `gpt~2` is the third shard of the run `gpt`. */
export const OPEN_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(~(0|[1-9]\d{0,3}))?$/

export type Mode = 'create' | 'resume' | 'create_or_resume'

/** Values are what the client sent; the optimizer layer knows their names, types and ranges. */
export type Hyperparameters = Readonly<Record<string, unknown>>

/** A group of `open`: its hyperparameters stand inline beside these keys. It needs an `algorithm` or a `preset`. */
export type GroupDeclaration = {
  readonly name: string
  readonly algorithm?: string
  readonly preset?: string
  readonly [hyperparameter: string]: unknown
}

/** How a tensor is cut into matrices; explicit, never guessed (docs/algorithms.md, "Layout"). */
export type Layout = { readonly split?: readonly number[]; readonly heads?: number; readonly matrices?: string }

/** A parameter of `open`; `shape` in elements as torch stores it (out x in), `group` by name, dtypes by name. */
export type ParameterDeclaration = Layout & {
  readonly name: string
  readonly shape: readonly number[]
  readonly group: string
  readonly gradient_dtype?: string
  readonly update_dtype?: string
  /** The elements [start, stop) in C order that this member sends and receives; left out: all of them. */
  readonly ranges?: readonly (readonly number[])[]
}

/**
 * Which member of a run a connection is: `rank` counts from 0 to `world_size` - 1 within the replica, and `replica`
 * (default 0) from 0 to `replicas` - 1 (default 1).
 */
export type MemberDeclaration = {
  readonly rank: number
  readonly world_size: number
  readonly replica?: number
  readonly replicas?: number
}

/** Whether the member of a rank has a connection; `replica` only in a run with several. */
export type MemberStatus = { readonly rank: number; readonly replica?: number; readonly connected: boolean }

/**
 * When a step may be closed without all replicas: `deadline_seconds` after the first `end` of it, or with all that are
 * connected, and never with fewer than `min_replicas`.
 */
export type Quorum = { readonly min_replicas: number; readonly deadline_seconds: number }

/** A replica of which the gradients of a step are the mean, and its weight there. */
export type Contribution = { readonly replica: number; readonly weight: number }

/** Rows of a parameter from `first_row` on, head after head (default 0). `parameter` is an index. */
export type RowsDeclaration = { readonly parameter: number; readonly first_row?: number }

/** An attention of `open`, for QK-clip. Rows of a head: `head_dim`, or with rule `mla` the other three. */
export type AttentionDeclaration = {
  readonly name: string
  readonly threshold?: number
  readonly rule?: string
  readonly query_heads: number
  readonly key_value_heads?: number
  readonly head_dim?: number
  readonly nope_dim?: number
  readonly rope_dim?: number
  readonly value_dim?: number
  readonly query: RowsDeclaration
  readonly key: RowsDeclaration
  readonly query_bias?: RowsDeclaration
  readonly key_bias?: RowsDeclaration
}

/** An attention as `opened` lists it, with every default filled in. */
export type AttentionDescription = AttentionDeclaration &
  Required<Pick<AttentionDeclaration, 'threshold' | 'rule' | 'key_value_heads'>>

/** A parameter as `opened` lists it; `step` is the last step applied to it. */
export type ParameterDescription = Layout & {
  readonly index: number
  readonly name: string
  readonly shape: readonly number[]
  readonly group: string
  readonly gradient_dtype: string
  readonly update_dtype: string
  readonly step: number
  readonly algorithm: string
}

/**
 * Memory for gradients and updates that a client on this host offers: `shm` are two memfds, by their `descriptors` in
 * the client's `process`; `cuda-ipc` two allocations on the GPU with the UUID `gpu`, by their `handles`. `nonce` are
 * 32 bytes that lie at the start of the memory for gradients as well.
 */
export type TransportOffer = {
  readonly kind: string
  readonly nonce: Uint8Array
  readonly process?: number
  readonly descriptors?: readonly number[]
  readonly gpu?: string
  readonly handles?: readonly Uint8Array[]
}

/** The way that gradients and updates take, and why no better one was taken. */
export type TransportAnswer = {
  readonly kind: string
  readonly refused: readonly { readonly kind: string; readonly reason: string }[]
}

/** Which shard of its whole a run is, by the assignment of a generation. */
export type ShardDeclaration = { readonly index: number; readonly generation: number }

/** A checkpoint of another run, by its id or a tag. */
export type Source = { readonly run: string; readonly checkpoint: string }

export type OpenFrame = {
  readonly type: 'open'
  readonly protocol: number
  readonly run: string
  readonly mode?: Mode
  readonly groups?: readonly GroupDeclaration[]
  readonly parameters?: readonly ParameterDeclaration[]
  readonly attentions?: readonly AttentionDeclaration[]
  readonly takeover?: boolean
  readonly checkpoint?: string
  readonly from?: Source
  readonly client?: string
  readonly transport?: readonly TransportOffer[]
  /** Left out: the run's only member, which sends and receives all elements. */
  readonly member?: MemberDeclaration
  /** Left out: a step needs all replicas. */
  readonly quorum?: Quorum
  /** A digest of the weights that the member begins with. */
  readonly weights?: string
  /** The client follows `moved` and `placed`, and wants so many shards; 0: as the service chooses. */
  readonly shards?: number
  /** With the name of a shard: what `placed` has said of it. */
  readonly shard?: ShardDeclaration
}

export type StepFrame = {
  readonly type: 'step'
  readonly step: number
  readonly groups?: Readonly<Record<string, Hyperparameters>>
  readonly gradient_scale?: number
  readonly max_logits?: Readonly<Record<string, readonly number[]>>
  /** The trainer's span that the step's is below. It is no value of the step: another one is no conflict. */
  readonly traceparent?: string
}

/** One chunk of a gradient; `offset` in bytes from the tensor's start, `data` raw little-endian bytes in C order. */
export type GradientFrame = {
  readonly type: 'gradient'
  readonly parameter: number
  readonly step: number
  readonly offset: number
  readonly data: Uint8Array
}

/** Gradients that lie in memory that the client shares: each in its parameter's slot, which is the service's now. */
export type GradientsFrame = {
  readonly type: 'gradients'
  readonly step: number
  readonly parameters: readonly number[]
}

export type EndFrame = {
  readonly type: 'end'
  readonly step: number
  readonly skipped?: readonly number[]
  /** Of the replica in the mean of replicas, above 0; default 1. */
  readonly weight?: number
}

export type CheckpointFrame = { readonly type: 'checkpoint'; readonly tag?: string }

export type ClientFrame = OpenFrame | StepFrame | GradientFrame | GradientsFrame | EndFrame | CheckpointFrame

export type OpenedFrame = {
  readonly type: 'opened'
  readonly run: string
  readonly epoch: number
  readonly step: number
  readonly resumed: boolean
  readonly digest: string
  readonly ahead: readonly number[]
  /** Those of the run, where `open` gave none: what it gave is the run's. */
  readonly parameters?: readonly ParameterDescription[]
  readonly attentions: readonly AttentionDescription[]
  readonly groups: Readonly<Record<string, Hyperparameters>>
  /** How the run came to its state if not by its own steps alone: an import, or a restore on another device. */
  readonly note?: string
  /** Answers the client's offers; left out where it made none. */
  readonly transport?: TransportAnswer
  /** As `open` gave it. */
  readonly member?: MemberDeclaration
  /** All members of the run, where `open` gave one. */
  readonly members?: readonly MemberStatus[]
  /** In force in a run with several replicas. */
  readonly quorum?: Quorum
  readonly limits: { readonly chunk_bytes: number; readonly [limit: string]: unknown }
  readonly server: {
    readonly name: string
    readonly version: string
    readonly device: string
    readonly [key: string]: unknown
  }
}

/** The run is opened at another process: `url` is its stream. */
export type MovedFrame = { readonly type: 'moved'; readonly run: string; readonly url: string }

/**
 * A shard of a run: `run` is its name and `url` the stream of the process that has it. `parameters` are ranges
 * [start, stop) of the whole's indices, ascending; the shard counts its own from 0 in that order. `checkpoint` is what
 * the shard goes back to, where `open` has named one of the whole.
 */
export type PlacedShard = {
  readonly run: string
  readonly url: string
  readonly parameters: readonly (readonly number[])[]
  readonly checkpoint?: string
}

/**
 * The run is a whole of several shards, each of which is opened for itself. `step` and `digest` are those of the last
 * step that all of them have finished and the head has committed.
 */
export type PlacedFrame = {
  readonly type: 'placed'
  readonly run: string
  readonly generation: number
  readonly step: number
  readonly resumed: boolean
  readonly digest: string
  readonly shards: readonly PlacedShard[]
  readonly limits: OpenedFrame['limits']
  readonly server: OpenedFrame['server']
}

/**
 * One chunk of an update; `offset` in bytes. The keys from `scale` to `update_rms` come with the first chunk only,
 * whose offset is 0. `row_scale` is a float32 for each row of the parameter.
 */
export type UpdateFrame = {
  readonly type: 'update'
  readonly parameter: number
  readonly step: number
  readonly offset: number
  readonly scale?: number
  readonly decay?: number
  readonly row_scale?: Uint8Array
  readonly replayed?: boolean
  readonly gradient_norm?: number
  readonly update_rms?: number
  readonly data?: Uint8Array
}

/**
 * Updates that lie in the memory that the client shares, each in its parameter's slot. The lists have an entry for each
 * of `parameters`; `row_scale` is by index, as text, for those that have one.
 */
export type UpdatesFrame = {
  readonly type: 'updates'
  readonly step: number
  readonly replayed: boolean
  readonly parameters: readonly number[]
  readonly scale: readonly number[]
  readonly decay: readonly number[]
  readonly gradient_norm: readonly number[]
  readonly update_rms: readonly number[]
  readonly row_scale?: Readonly<Record<string, Uint8Array>>
}

/** Seconds that a step spent in each phase. */
export type StepSeconds = {
  readonly receive: number
  readonly queue: number
  readonly compute: number
  readonly send: number
}

export type ReceiptFrame = {
  readonly type: 'receipt'
  readonly step: number
  readonly replayed: boolean
  readonly applied: number
  readonly skipped: number
  readonly gradient_norm: number
  readonly groups: Readonly<Record<string, Hyperparameters>>
  readonly clipped_heads: Readonly<Record<string, number>>
  /** The largest of the step's max_logits. */
  readonly max_logit?: number
  readonly digest: string
  readonly durable: boolean
  readonly seconds: StepSeconds
  /** The replicas whose mean the step is made of, in a run with several. */
  readonly contributors?: readonly Contribution[]
  /** Whether the replica of this member is one of them. */
  readonly contributed?: boolean
}

export type CheckpointedFrame = {
  readonly type: 'checkpointed'
  readonly checkpoint: string
  readonly step: number
  readonly digest: string
  readonly bytes: number
}

export type ErrorFrame = {
  readonly type: 'error'
  readonly code: ErrorCode
  readonly message: string
  readonly status: number
  readonly retryable: boolean
  readonly parameter?: number
  readonly step?: number
  readonly expected_step?: number
  readonly retry_after_seconds?: number
  /** The step was closed without this replica: its updates and its receipt come with the `end` of it. */
  readonly left_out?: boolean
}

/** Members that have opened the run or were lost since the last such frame, or since `opened`. */
export type MembersFrame = { readonly type: 'members'; readonly members: readonly MemberStatus[] }

export type DrainingFrame = { readonly type: 'draining'; readonly deadline_seconds: number }

export type ServerFrame =
  | OpenedFrame
  | MovedFrame
  | PlacedFrame
  | UpdateFrame
  | UpdatesFrame
  | ReceiptFrame
  | CheckpointedFrame
  | ErrorFrame
  | MembersFrame
  | DrainingFrame
