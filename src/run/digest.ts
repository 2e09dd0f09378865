import { createHash } from 'node:crypto'

/** What one parameter adds to a step's digest: an applied one its numbers, a skipped one nothing but its place. */
export type DigestRecord = {
  gradient_scale: number
  gradientFingerprint: bigint
  updateFingerprint: bigint
  scale: number
  decay: number
}

const APPLIED = 1
const RECORD_BYTES = 4 + 1 + 5 * 8

/** The digest before the first step. */
export const FIRST_DIGEST = createHash('sha256').update('muond digest 1').digest('hex')

/**
 * SHA-256 over the digest before, the step's number and one record per parameter in index order (docs/protocol.md, Digest).
 * It holds neither the run's name nor a time: equal inputs give equal digests.
 */
export function nextDigest(previous: string, step: number, records: readonly (DigestRecord | undefined)[]): string {
  const hash = createHash('sha256').update(previous, 'hex')
  const number = Buffer.alloc(8)
  number.writeBigUInt64LE(BigInt(step))
  hash.update(number)
  records.forEach((record, index) => {
    hash.update(encodeRecord(index, record))
  })
  return hash.digest('hex')
}

function encodeRecord(index: number, record: DigestRecord | undefined): Buffer {
  const bytes = Buffer.alloc(record ? RECORD_BYTES : 5)
  bytes.writeUInt32LE(index)
  if (!record) return bytes
  bytes.writeUInt8(APPLIED, 4)
  bytes.writeDoubleLE(record.gradient_scale, 5)
  bytes.writeBigUInt64LE(record.gradientFingerprint, 13)
  bytes.writeBigUInt64LE(record.updateFingerprint, 21)
  bytes.writeDoubleLE(record.scale, 29)
  bytes.writeDoubleLE(record.decay, 37)
  return bytes
}
