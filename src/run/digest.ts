import { createHash } from 'node:crypto'
import type { Contribution } from '../wire/frame.js'

/** A replica that a gradient is the mean of: its weight, and the fingerprint of what it has sent. */
export type Contributor = Contribution & { readonly fingerprint: bigint }

/** What an applied gradient adds to a step's digest; `contributors`, where it is a mean of replicas. */
export type DigestRecord = {
  gradient_scale: number
  gradientFingerprint: bigint
  updateFingerprint: bigint
  scale: number
  decay: number
  contributors?: readonly Contributor[]
}

/**
 * What one parameter adds to a step's digest: a skipped one nothing but its place, unless QK-clip scales its rows
 * (float32 bytes).
 */
export type StepRecord = { applied?: DigestRecord; row_scale?: Uint8Array }

const APPLIED = 1
const HAS_ROW_SCALE = 2
const IS_MEAN = 4

/** The digest before the first step. */
export const FIRST_DIGEST = createHash('sha256').update('muond digest 1').digest('hex')

/**
 * SHA-256 over the digest before, the step's number and one record per parameter in index order (docs/protocol.md,
 * Digest). It holds neither the run's name nor a time: equal inputs give equal digests.
 */
export function nextDigest(previous: string, step: number, records: Iterable<StepRecord>): string {
  const hash = createHash('sha256').update(previous, 'hex')
  hash.update(encodeLong(step))
  let index = 0
  for (const { applied, row_scale } of records) {
    const flags = (applied ? APPLIED : 0) + (row_scale ? HAS_ROW_SCALE : 0) + (applied?.contributors ? IS_MEAN : 0)
    hash.update(encodePlace(index++, flags))
    if (applied) hash.update(encodeApplied(applied))
    if (row_scale) hash.update(encodeCount(row_scale.length / Float32Array.BYTES_PER_ELEMENT)).update(row_scale)
  }
  return hash.digest('hex')
}

/**
 * An import's state of one parameter: SHA-256 of each state tensor's bytes as they are kept, in the kernel's order,
 * and its count.
 */
export type ImportedHashes = { hashes: readonly string[]; count: number }

/**
 * SHA-256 over the digest of the last finished step and the whole state that the run has from now on
 * (docs/protocol.md, Digest). To import something else before the next step, or the same again, is to import that.
 */
export function importDigest(stepDigest: string, places: Iterable<ImportedHashes>): string {
  const hash = createHash('sha256').update('muond import').update(stepDigest, 'hex')
  for (const { hashes, count } of places) {
    for (const tensor of hashes) hash.update(tensor, 'hex')
    hash.update(encodeLong(count))
  }
  return hash.digest('hex')
}

function encodePlace(index: number, flags: number): Buffer {
  const bytes = Buffer.alloc(5)
  bytes.writeUInt32LE(index)
  bytes.writeUInt8(flags, 4)
  return bytes
}

function encodeApplied(record: DigestRecord): Buffer {
  const bytes = Buffer.alloc(5 * 8)
  bytes.writeDoubleLE(record.gradient_scale, 0)
  bytes.writeBigUInt64LE(record.gradientFingerprint, 8)
  bytes.writeBigUInt64LE(record.updateFingerprint, 16)
  bytes.writeDoubleLE(record.scale, 24)
  bytes.writeDoubleLE(record.decay, 32)
  if (!record.contributors) return bytes
  return Buffer.concat([bytes.subarray(0, 16), encodeContributors(record.contributors), bytes.subarray(16)])
}

function encodeContributors(contributors: readonly Contributor[]): Buffer {
  const all = contributors.map(({ replica, weight, fingerprint }) => {
    const bytes = Buffer.alloc(4 + 2 * 8)
    bytes.writeUInt32LE(replica, 0)
    bytes.writeDoubleLE(weight, 4)
    bytes.writeBigUInt64LE(fingerprint, 12)
    return bytes
  })
  return Buffer.concat([encodeCount(contributors.length), ...all])
}

function encodeLong(value: number): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64LE(BigInt(value))
  return bytes
}

function encodeCount(count: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(count)
  return bytes
}
