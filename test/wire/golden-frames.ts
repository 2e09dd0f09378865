import { join } from 'node:path'
import { encodeFrame, encodeWithData } from '../../src/wire/codec.js'
import type { ClientFrame, ServerFrame } from '../../src/wire/frame.js'
import { CLIENT_FRAMES } from '../../src/wire/frame-schemas.js'
import { type Cursor, cursorOf, nextToken, takeBytes } from '../../src/wire/msgpack.js'
import type { Schema } from '../../src/wire/schema.js'
import { EXAMPLE } from './example.js'

/**
 * The frames of docs/frames: the step of the worked example in docs/protocol.md, then one frame of each type with every
 * key that it may have. Their values go together as far as that is possible; no service has to take them.
 */

export type GoldenFrame = { path: string; frame: ClientFrame | ServerFrame }

const FOLDER = 'docs/frames'
const FACTORS = { scale: -0.5, decay: 0.25, gradient_norm: 0, update_rms: 1 }
const MUON = { algorithm: 'muon', lr: 1, ns_steps: 5, nesterov: true, adjust_lr_fn: 'match_rms_adamw' }
const ADAMW = { algorithm: 'adamw', lr: 0.001, betas: [0, 0.95], weight_decay: 0 }
const ROWS = { query: { parameter: 0, first_row: 0 }, key: { parameter: 0, first_row: 2 } }
const BIASES = { query_bias: { parameter: 1, first_row: 0 }, key_bias: { parameter: 1, first_row: 2 } }
const MLA = { nope_dim: 1, rope_dim: 0, value_dim: 1 }
const ATTENTION = {
  ...{ name: 'h.0', threshold: 100, rule: 'mha', query_heads: 2, key_value_heads: 2, head_dim: 1 },
  ...{ ...MLA, ...ROWS, ...BIASES },
}
const PARAMETER = {
  ...{ name: 'h.0.attn', shape: [4, 300], group: 'matrices', gradient_dtype: 'bfloat16', update_dtype: 'bfloat16' },
  ...{ split: [2, 2], heads: 2, matrices: 'batch' },
}
const MEMBER = { rank: 1, world_size: 2, replica: 0, replicas: 2 }
const QUORUM = { min_replicas: 1, deadline_seconds: 30 }
const MEMBERS = [
  { rank: 0, replica: 0, connected: true },
  { rank: 1, replica: 1, connected: false },
]
const ONES = Buffer.from(Float32Array.of(1, 1).buffer)

const WHOLE: readonly (ClientFrame | ServerFrame)[] = [
  {
    type: 'open',
    protocol: 1,
    run: 'gpt.2-small_7',
    mode: 'resume',
    groups: [
      { name: 'matrices', ...MUON },
      { name: 'rest', preset: 'kimi-k2', ...ADAMW },
    ],
    parameters: [
      { ...PARAMETER, ranges: [[0, 600]] },
      { name: 'größe', shape: [], group: 'rest' },
    ],
    attentions: [ATTENTION],
    takeover: true,
    checkpoint: 'best',
    from: { run: 'other', checkpoint: 'best' },
    client: 'a client in Go',
    transport: [
      { kind: 'shm', nonce: Buffer.alloc(32, 7), process: 70_000, descriptors: [20, 21] },
      { kind: 'cuda-ipc', nonce: Buffer.alloc(32, 7), gpu: 'GPU-0', handles: [Buffer.alloc(64), Buffer.alloc(64, 1)] },
    ],
    member: MEMBER,
    quorum: QUORUM,
    weights: 'sha256:0f1e2d3c',
    shards: 2,
    shard: { index: 1, generation: 300 },
  },
  {
    type: 'step',
    step: 300,
    groups: { matrices: { lr: 1 }, rest: { betas: [0, 0.5] } },
    gradient_scale: 1,
    traceparent: '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
    max_logits: { 'h.0': [99, 120.5] },
  },
  { type: 'gradient', parameter: 200, step: 70_000, offset: 4_194_304, data: Buffer.alloc(300, 0x3f) },
  { type: 'gradients', step: 300, parameters: [0, 1, 200] },
  { type: 'end', step: 300, skipped: [2, 300], weight: 1 },
  { type: 'checkpoint', tag: 'best' },
  {
    type: 'opened',
    run: 'gpt.2-small_7',
    epoch: 2,
    step: 299,
    resumed: true,
    digest: 'a97c'.repeat(16),
    ahead: [0],
    parameters: [{ index: 0, ...PARAMETER, step: 300, algorithm: 'muon' }],
    attentions: [ATTENTION],
    groups: { matrices: MUON, rest: { ...ADAMW, preset: 'kimi-k2' } },
    note: 'step 299 was computed by another kind of device',
    transport: { kind: 'shm', refused: [{ kind: 'cuda-ipc', reason: 'the service computes on the CPU' }] },
    member: MEMBER,
    members: MEMBERS,
    quorum: QUORUM,
    limits: { chunk_bytes: 4_194_304 },
    server: { name: 'muond', version: '0.1.0', device: 'cpu' },
  },
  { type: 'moved', run: 'gpt.2-small_7', url: 'ws://10.0.0.2:8787/v1/stream' },
  {
    type: 'placed',
    run: 'gpt.2-small_7',
    generation: 300,
    step: 299,
    resumed: true,
    digest: 'a97c'.repeat(16),
    shards: [
      { run: 'gpt.2-small_7~0', url: 'ws://10.0.0.2:8787/v1/stream', parameters: [[0, 1]], checkpoint: '299-1' },
      {
        ...{ run: 'gpt.2-small_7~1', url: 'ws://10.0.0.3:8787/v1/stream' },
        parameters: [
          [1, 2],
          [3, 300],
        ],
      },
    ],
    limits: { chunk_bytes: 4_194_304 },
    server: { name: 'muond', version: '0.1.0', device: 'cpu' },
  },
  {
    ...{ type: 'update', parameter: 200, step: 70_000, offset: 0, ...FACTORS },
    ...{ row_scale: ONES, replayed: false, data: Buffer.alloc(300, 0x3f) },
  },
  {
    ...{ type: 'updates', step: 300, replayed: true, parameters: [0, 1], scale: [-1, -0.5], decay: [0, 0.25] },
    ...{ gradient_norm: [0, 2], update_rms: [1, 1], row_scale: { 0: ONES } },
  },
  {
    type: 'receipt',
    step: 300,
    replayed: true,
    applied: 2,
    skipped: 1,
    gradient_norm: 2,
    groups: { matrices: MUON, rest: ADAMW },
    clipped_heads: { 'h.0': 1 },
    max_logit: 120,
    digest: 'a97c'.repeat(16),
    durable: true,
    seconds: { receive: 1, queue: 0, compute: 0.25, send: 2 },
    contributors: [{ replica: 1, weight: 2 }],
    contributed: false,
  },
  { type: 'checkpointed', checkpoint: '300-1', step: 300, digest: 'a97c'.repeat(16), bytes: 5_000_000_000 },
  {
    type: 'error',
    code: 'STEP_CONFLICT',
    message: "step 299 of parameter 'w': expected is step 301",
    status: 409,
    retryable: false,
    parameter: 0,
    step: 299,
    expected_step: 301,
    retry_after_seconds: 1,
    left_out: true,
  },
  { type: 'members', members: MEMBERS },
  { type: 'draining', deadline_seconds: 30 },
]

/** Who sends a frame. */
export function senderOf({ type }: ClientFrame | ServerFrame): 'client' | 'service' {
  return Object.hasOwn(CLIENT_FRAMES, type) ? 'client' : 'service'
}

/** The files without their endings, `example/1-open` or `client/open`, and what is in them. */
export const GOLDEN_FRAMES: readonly GoldenFrame[] = [
  ...EXAMPLE.slice(0, 6).map(({ frame }, i) => ({ path: join(FOLDER, 'example', `${i + 1}-${frame.type}`), frame })),
  ...WHOLE.map((frame) => ({ path: join(FOLDER, senderOf(frame), frame.type), frame })),
]

/** The bytes of a frame as the service and its Node client write it. */
export function encode(frame: ClientFrame | ServerFrame): Buffer {
  if (frame.type !== 'gradient' && (frame.type !== 'update' || !frame.data)) return encodeFrame(frame)
  const { data = new Uint8Array(), ...header } = frame
  return encodeWithData(header, data)
}

/** A message as JSON: a float always has a dot, an integer never, and a bin is a map of `bin` and its bytes in hexadecimal. */
export function jsonOf(message: Uint8Array): string {
  return `${valueAt(cursorOf(message), '')}\n`
}

function valueAt(cursor: Cursor, indent: string): string {
  const { kind, value } = nextToken(cursor)
  const bytes = () => takeBytes(cursor, value)!
  const inner = `${indent}  `
  switch (kind) {
    case 'string':
      return JSON.stringify(bytes().toString())
    case 'bin':
      return `{ "bin": "${bytes().toString('hex')}" }`
    case 'bool':
      return String(value === 1)
    case 'float':
      return Number.isInteger(value) ? value.toFixed(1) : String(value)
    case 'list':
      return `[${Array.from({ length: value }, () => valueAt(cursor, indent)).join(', ')}]`
    case 'map':
      return mapOf(
        Array.from({ length: value }, () => `${inner}${valueAt(cursor, inner)}: ${valueAt(cursor, inner)}`),
        indent,
      )
    default:
      return String(value)
  }
}

function mapOf(lines: readonly string[], indent: string): string {
  return lines.length === 0 ? '{}' : `{\n${lines.join(',\n')}\n${indent}}`
}

/** The keys of a map and of all maps in it. */
export function keysOf(schema: Schema): string[] {
  if (schema.is === 'list' || schema.is === 'dictionary') return keysOf(schema.of)
  if (schema.is !== 'map') return []
  return Object.entries({ ...schema.required, ...schema.optional }).flatMap(([key, of]) => [key, ...keysOf(of)])
}
