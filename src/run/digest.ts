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
  const hash = new RecordHash().hex(previous).long(BigInt(step))
  let index = 0
  for (const { applied, row_scale } of records) {
    const flags = (applied ? APPLIED : 0) + (row_scale ? HAS_ROW_SCALE : 0) + (applied?.contributors ? IS_MEAN : 0)
    hash.count(index++).byte(flags)
    if (applied) hash.applied(applied)
    if (row_scale) hash.count(row_scale.length / Float32Array.BYTES_PER_ELEMENT).bytes(row_scale)
  }
  return hash.digest()
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
  const hash = new RecordHash().bytes(Buffer.from('muond import')).hex(stepDigest)
  for (const { hashes, count } of places) {
    for (const tensor of hashes) hash.hex(tensor)
    hash.long(BigInt(count))
  }
  return hash.digest()
}

// To hash the few bytes of a record takes less time than the call that does it: they are hashed so many at a time.
const BUFFER_BYTES = 65_536

/** SHA-256 of numbers, little-endian, and bytes. */
class RecordHash {
  readonly #hash = createHash('sha256')
  readonly #buffer = Buffer.alloc(BUFFER_BYTES)
  readonly #view = new DataView(this.#buffer.buffer, this.#buffer.byteOffset, BUFFER_BYTES)
  #at = 0

  byte(value: number): this {
    this.#view.setUint8(this.#take(1), value)
    return this
  }

  count(value: number): this {
    this.#view.setUint32(this.#take(4), value, true)
    return this
  }

  long(value: bigint): this {
    this.#view.setBigUint64(this.#take(8), value, true)
    return this
  }

  double(value: number): this {
    this.#view.setFloat64(this.#take(8), value, true)
    return this
  }

  applied({ gradient_scale, gradientFingerprint, contributors, updateFingerprint, scale, decay }: DigestRecord): this {
    this.double(gradient_scale).long(gradientFingerprint)
    if (contributors) this.#contributors(contributors)
    return this.long(updateFingerprint).double(scale).double(decay)
  }

  bytes(value: Uint8Array): this {
    this.#flush()
    this.#hash.update(value)
    return this
  }

  hex(value: string): this {
    return this.bytes(Buffer.from(value, 'hex'))
  }

  digest(): string {
    this.#flush()
    return this.#hash.digest('hex')
  }

  #contributors(contributors: readonly Contributor[]): void {
    this.count(contributors.length)
    for (const { replica, weight, fingerprint } of contributors) this.count(replica).double(weight).long(fingerprint)
  }

  /** Where the next `bytes` bytes go. */
  #take(bytes: number): number {
    if (this.#at + bytes > BUFFER_BYTES) this.#flush()
    this.#at += bytes
    return this.#at - bytes
  }

  #flush(): void {
    this.#hash.update(this.#buffer.subarray(0, this.#at))
    this.#at = 0
  }
}
