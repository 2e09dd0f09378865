import { createHash } from 'node:crypto'
import type { ClientFrame, ServerFrame } from '../../src/wire/frame.js'

/**
 * The step of the example in docs/protocol.md: one 2 x 2 parameter, sgd at lr 0.5, so the update is the gradient. Then
 * the frames of rank 1 in the same step by two members, of which each has one row; and those of replica 1 in a step of
 * two replicas, whose mean is [[4, 5], [6, 7]].
 */

const MASK = 2n ** 64n - 1n
const GRADIENT = Buffer.from(Float32Array.of(1, 2, 3, 4).buffer)
const GRADIENT_1 = Buffer.from(Float32Array.of(5, 6, 7, 8).buffer)
const MEAN = Buffer.from(Float32Array.of(4, 5, 6, 7).buffer)
const WEIGHTS = [1, 3]
const GROUPS = { all: { algorithm: 'sgd', lr: 0.5, momentum: 0, dampening: 0, nesterov: false, weight_decay: 0 } }
const FIRST_DIGEST = createHash('sha256').update('muond digest 1').digest()

export const EXAMPLE: { heading: string; frame: ClientFrame | ServerFrame }[] = [
  {
    heading: 'open',
    frame: {
      type: 'open',
      protocol: 1,
      run: 'demo',
      groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
      parameters: [{ name: 'w', shape: [2, 2], group: 'all' }],
    },
  },
  {
    heading: 'opened',
    frame: {
      type: 'opened',
      run: 'demo',
      epoch: 1,
      step: 0,
      resumed: false,
      digest: FIRST_DIGEST.toString('hex'),
      ahead: [],
      attentions: [],
      groups: GROUPS,
      limits: { chunk_bytes: 4_194_304 },
      server: { name: 'muond', version: '0.1.0', device: 'cpu' },
    },
  },
  { heading: 'gradient', frame: { type: 'gradient', parameter: 0, step: 1, offset: 0, data: GRADIENT } },
  {
    heading: 'update',
    frame: {
      type: 'update',
      parameter: 0,
      step: 1,
      offset: 0,
      scale: -0.5,
      decay: 0,
      replayed: false,
      gradient_norm: Math.sqrt(30),
      update_rms: Math.sqrt(7.5),
      data: GRADIENT,
    },
  },
  { heading: 'end', frame: { type: 'end', step: 1 } },
  {
    heading: 'receipt',
    frame: {
      type: 'receipt',
      step: 1,
      replayed: false,
      applied: 1,
      skipped: 0,
      gradient_norm: Math.sqrt(30),
      groups: GROUPS,
      clipped_heads: {},
      digest: digestOfStep(),
      durable: false,
      seconds: { receive: 0.0005, queue: 0, compute: 0.00025, send: 0.0005 },
    },
  },
  {
    heading: 'open',
    frame: {
      type: 'open',
      protocol: 1,
      run: 'pair',
      groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
      parameters: [{ name: 'w', shape: [2, 2], group: 'all', ranges: [[2, 4]] }],
      member: { rank: 1, world_size: 2 },
    },
  },
  {
    heading: 'opened',
    frame: {
      type: 'opened',
      run: 'pair',
      epoch: 2,
      step: 0,
      resumed: false,
      digest: FIRST_DIGEST.toString('hex'),
      ahead: [],
      attentions: [],
      groups: GROUPS,
      member: { rank: 1, world_size: 2 },
      members: [
        { rank: 0, connected: true },
        { rank: 1, connected: true },
      ],
      limits: { chunk_bytes: 4_194_304 },
      server: { name: 'muond', version: '0.1.0', device: 'cpu' },
    },
  },
  { heading: 'members', frame: { type: 'members', members: [{ rank: 1, connected: true }] } },
  {
    heading: 'gradient',
    frame: { type: 'gradient', parameter: 0, step: 1, offset: 8, data: GRADIENT.subarray(8) },
  },
  {
    heading: 'update',
    frame: {
      type: 'update',
      parameter: 0,
      step: 1,
      offset: 8,
      scale: -0.5,
      decay: 0,
      replayed: false,
      gradient_norm: Math.sqrt(30),
      update_rms: Math.sqrt(7.5),
      data: GRADIENT.subarray(8),
    },
  },
  {
    heading: 'open',
    frame: {
      type: 'open',
      protocol: 1,
      run: 'mean',
      groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
      parameters: [{ name: 'w', shape: [2, 2], group: 'all' }],
      member: { rank: 0, world_size: 1, replica: 1, replicas: 2 },
    },
  },
  { heading: 'gradient', frame: { type: 'gradient', parameter: 0, step: 1, offset: 0, data: GRADIENT_1 } },
  { heading: 'end', frame: { type: 'end', step: 1, weight: 3 } },
  {
    heading: 'update',
    frame: {
      type: 'update',
      parameter: 0,
      step: 1,
      offset: 0,
      scale: -0.5,
      decay: 0,
      replayed: false,
      gradient_norm: Math.sqrt(126),
      update_rms: Math.sqrt(31.5),
      data: MEAN,
    },
  },
  {
    heading: 'receipt',
    frame: {
      type: 'receipt',
      step: 1,
      replayed: false,
      applied: 1,
      skipped: 0,
      gradient_norm: Math.sqrt(126),
      groups: GROUPS,
      clipped_heads: {},
      digest: digestOfMean(),
      durable: false,
      seconds: { receive: 0.0005, queue: 0, compute: 0.00025, send: 0.0005 },
      contributors: WEIGHTS.map((weight, replica) => ({ replica, weight })),
      contributed: true,
    },
  },
]

/** The digest as the section "Digest" defines it, for the one record of this step. */
function digestOfStep(): string {
  const fields = Buffer.alloc(53)
  fields.writeBigUInt64LE(1n, 0)
  fields.writeUInt32LE(0, 8)
  fields.writeUInt8(1, 12)
  fields.writeDoubleLE(1, 13)
  fields.writeBigUInt64LE(fingerprint(GRADIENT), 21)
  fields.writeBigUInt64LE(fingerprint(GRADIENT), 29)
  fields.writeDoubleLE(-0.5, 37)
  fields.writeDoubleLE(0, 45)
  return createHash('sha256').update(FIRST_DIGEST).update(fields).digest('hex')
}

/** The digest of the step of two replicas: its one record is that of a mean. */
function digestOfMean(): string {
  const fields = Buffer.alloc(97)
  fields.writeBigUInt64LE(1n, 0)
  fields.writeUInt32LE(0, 8)
  fields.writeUInt8(5, 12)
  fields.writeDoubleLE(1, 13)
  fields.writeBigUInt64LE(fingerprint(MEAN), 21)
  fields.writeUInt32LE(2, 29)
  for (const [replica, gradient] of [GRADIENT, GRADIENT_1].entries()) {
    fields.writeUInt32LE(replica, 33 + 20 * replica)
    fields.writeDoubleLE(WEIGHTS[replica]!, 37 + 20 * replica)
    fields.writeBigUInt64LE(fingerprint(gradient), 45 + 20 * replica)
  }
  fields.writeBigUInt64LE(fingerprint(MEAN), 73)
  fields.writeDoubleLE(-0.5, 81)
  fields.writeDoubleLE(0, 89)
  return createHash('sha256').update(FIRST_DIGEST).update(fields).digest('hex')
}

/** The fingerprint as the section "Fingerprint" defines it, word by word. */
export function fingerprint(bytes: Uint8Array): bigint {
  const padded = Buffer.alloc(Math.ceil(bytes.length / 8) * 8)
  padded.set(bytes)
  let sum = mix(BigInt(bytes.length))
  for (let i = 0; i < padded.length / 8; i++) {
    sum += mix((padded.readBigUInt64LE(8 * i) + BigInt(i + 1) * 0x9e3779b97f4a7c15n) & MASK)
  }
  return sum & MASK
}

function mix(x: bigint): bigint {
  let y = x ^ (x >> 32n)
  y = (y * 0xd6e8feb86659fd93n) & MASK
  y ^= y >> 29n
  y = (y * 0xa0761d6478bd642fn) & MASK
  return y ^ (y >> 32n)
}
