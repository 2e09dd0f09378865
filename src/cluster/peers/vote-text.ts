import { ServiceError } from '../../errors.js'
import type { ReceiptFrame } from '../../wire/frame.js'
import type { Vote, VotedRecord } from '../vote.js'

// A vote as JSON. Records are bytes in it: JSON has no -0, the scale of a learning rate of 0, and no 64-bit integers.

/** A vote as the body of a request; `records` are base64. */
export type VoteBody = {
  readonly generation: number
  readonly shard: number
  readonly step: number
  readonly records: string
  readonly receipt: Omit<ReceiptFrame, 'type'>
}

const APPLIED = 1
const HAS_ROW_SCALE = 2
/** gradient_scale, both fingerprints, scale, decay and the square of the gradient's norm: 8 bytes each. */
const APPLIED_BYTES = 48

export function voteBody({ records, receipt, ...vote }: Vote): VoteBody {
  const { type: _, ...rest } = receipt
  return { ...vote, records: recordsText(records), receipt: rest }
}

/** Throws REQUEST_INVALID where the records are not bytes of any. */
export function voteOf({ records, receipt, ...vote }: VoteBody): Vote {
  return { ...vote, records: recordsOf(records), receipt: { type: 'receipt', ...receipt } }
}

function recordsText(records: readonly VotedRecord[]): string {
  return Buffer.concat(records.map(recordBytes)).toString('base64')
}

function recordBytes({ applied, row_scale, gradient_square }: VotedRecord): Buffer {
  const flags = (applied ? APPLIED : 0) + (row_scale ? HAS_ROW_SCALE : 0)
  const head = Buffer.alloc(1 + (applied ? APPLIED_BYTES : 0) + (row_scale ? 4 : 0))
  let at = head.writeUInt8(flags)
  if (applied) {
    at = head.writeDoubleLE(applied.gradient_scale, at)
    at = head.writeBigUInt64LE(applied.gradientFingerprint, at)
    at = head.writeBigUInt64LE(applied.updateFingerprint, at)
    at = head.writeDoubleLE(applied.scale, at)
    at = head.writeDoubleLE(applied.decay, at)
    at = head.writeDoubleLE(gradient_square, at)
  }
  if (!row_scale) return head
  head.writeUInt32LE(row_scale.length, at)
  return Buffer.concat([head, row_scale])
}

function recordsOf(text: string): VotedRecord[] {
  const bytes = Buffer.from(text, 'base64')
  const records: VotedRecord[] = []
  try {
    for (let at = 0; at < bytes.length; ) {
      const { record, end } = recordAt(bytes, at)
      records.push(record)
      at = end
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error
    throw new ServiceError('REQUEST_INVALID', `the records of a vote end within record ${records.length}`)
  }
  return records
}

/** The record that begins at a byte, and where the next one does. Throws RangeError where the bytes end in it. */
function recordAt(bytes: Buffer, start: number): { record: VotedRecord; end: number } {
  const flags = bytes.readUInt8(start)
  if (flags > APPLIED + HAS_ROW_SCALE)
    throw new ServiceError('REQUEST_INVALID', `a record of a vote has flags ${flags}, expected 0 to 3`)
  let at = start + 1
  let applied: VotedRecord['applied']
  let gradient_square = 0
  if (flags & APPLIED) {
    applied = {
      gradient_scale: bytes.readDoubleLE(at),
      gradientFingerprint: bytes.readBigUInt64LE(at + 8),
      updateFingerprint: bytes.readBigUInt64LE(at + 16),
      scale: bytes.readDoubleLE(at + 24),
      decay: bytes.readDoubleLE(at + 32),
    }
    gradient_square = bytes.readDoubleLE(at + 40)
    at += APPLIED_BYTES
  }
  const record = { ...(applied && { applied }), gradient_square }
  if ((flags & HAS_ROW_SCALE) === 0) return { record, end: at }
  const length = bytes.readUInt32LE(at)
  const end = at + 4 + length
  if (end > bytes.length) throw new RangeError(`${length} bytes of row scales`)
  return { record: { ...record, row_scale: Uint8Array.from(bytes.subarray(at + 4, end)) }, end }
}
