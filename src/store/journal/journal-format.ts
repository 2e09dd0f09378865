import { createHash } from 'node:crypto'
import { errorText } from '../../errors.js'
import type { ReceiptFrame } from '../../wire/frame.js'
import { type AppliedRecord, held, type SettingsRecord, UnreadableError } from '../checkpoint/manifest.js'
import { headRule } from './journal-rules.js'

// A journal is one record after the other. A record is
//   4 bytes  "MJ1\n"
//   4 bytes  length of the head, little-endian, as all numbers
//   8 bytes  length of the payload
//   8 bytes  the first 8 bytes of SHA-256 over both lengths and the head
//   the head, JSON
//   the payload: the bytes of a gradient as they were received. Its fingerprint (docs/protocol.md) stands in the head.

/** The head of a gradient's record: the gradient was applied, and `applied` says how. The payload is the gradient. */
export type AppliedHead = { type: 'gradient'; step: number; parameter: number; applied: AppliedRecord }

/** The head of a finished step's record, which has no payload: its settings, and its receipt. */
export type EndHead = {
  type: 'end'
  step: number
  digest: string
  skipped: readonly number[]
  settings: SettingsRecord
  receipt: ReceiptFrame
}

export type Head = AppliedHead | EndHead

export const MAGIC = Buffer.from('MJ1\n')
export const PREFIX_BYTES = 24
/** Most bytes of a head. An end names every skipped parameter and every hyperparameter: some hundred bytes each. */
export const MAX_HEAD_BYTES = 64 << 20

const SUM_AT = 16

/** A record without its payload, which has to follow. */
export function encodeHead(head: Head, payloadBytes: number): Buffer {
  const json = Buffer.from(JSON.stringify(head))
  const prefix = Buffer.alloc(PREFIX_BYTES)
  prefix.set(MAGIC)
  prefix.writeUInt32LE(json.length, 4)
  prefix.writeBigUInt64LE(BigInt(payloadBytes), 8)
  checksum(prefix, json).copy(prefix, SUM_AT)
  return Buffer.concat([prefix, json])
}

/** The lengths of a record's head and payload, in bytes; undefined where `prefix` does not begin a record. */
export function readPrefix(prefix: Buffer): { headBytes: number; payloadBytes: number } | undefined {
  if (prefix.length < PREFIX_BYTES || !prefix.subarray(0, MAGIC.length).equals(MAGIC)) return undefined
  const headBytes = prefix.readUInt32LE(4)
  const payloadBytes = Number(prefix.readBigUInt64LE(8))
  return headBytes > MAX_HEAD_BYTES || !Number.isSafeInteger(payloadBytes) ? undefined : { headBytes, payloadBytes }
}

/**
 * The head whose JSON follows a prefix; undefined where a bit of either was changed. Throws UnreadableError with the
 * field where the checksum is right and a field is not what it must be; `label` names the record.
 */
export function readHead(prefix: Buffer, json: Buffer, label: string): Head | undefined {
  if (!checksum(prefix, json).equals(prefix.subarray(SUM_AT, PREFIX_BYTES))) return undefined
  return held(headRule, parsed(json, label), label)
}

function parsed(json: Buffer, label: string): unknown {
  try {
    return JSON.parse(json.toString())
  } catch (error) {
    throw new UnreadableError(`${label}: the head is no JSON: ${errorText(error)}`)
  }
}

function checksum(prefix: Buffer, json: Buffer): Buffer {
  const hash = createHash('sha256').update(prefix.subarray(MAGIC.length, SUM_AT)).update(json)
  return hash.digest().subarray(0, PREFIX_BYTES - SUM_AT)
}
