import type { VotedRecord } from '../../src/cluster/vote.js'
import { nextDigest } from '../../src/run/digest.js'
import type { ReceiptFrame } from '../../src/wire/frame.js'

/** Mixes whole numbers to one of 32 bits, so that each combination has values of its own. */
export function mix(...numbers: readonly number[]): number {
  let state = 0x9e3779b9
  for (const number of numbers) {
    state = Math.imul(state ^ number, 0x85ebca6b)
    state = Math.imul(state ^ (state >>> 13), 0xc2b2ae35) ^ (state >>> 16)
  }
  return state >>> 0
}

/** The record of a parameter in a step; another `variant` has other gradients. Each ninth one is skipped. */
export function recordOf(parameter: number, step: number, variant = 0): VotedRecord {
  const bits = mix(parameter, step, variant)
  const row_scale = bits % 5 === 0 ? new Uint8Array(Float32Array.of(1, 1 / (1 + (bits % 7))).buffer) : undefined
  if (bits % 9 === 0) return { row_scale, gradient_square: 0 }
  const gradientFingerprint = (BigInt(bits) << 32n) + BigInt(mix(bits))
  const updateFingerprint = gradientFingerprint ^ 0xffffn
  const applied = { gradient_scale: 1, gradientFingerprint, updateFingerprint, scale: -0.02 / step, decay: 0.001 }
  return { applied, row_scale, gradient_square: (bits % 1000) / 7 }
}

type Parts = { readonly digest: string; readonly records: readonly VotedRecord[]; readonly durable?: boolean }

/** The receipt of whoever has these records, as `conclude` makes it (src/run/step/conclusion.ts). */
export function receiptOf(step: number, { digest, records, durable = true }: Parts): ReceiptFrame {
  const applied = records.filter((record) => record.applied)
  return {
    ...{ type: 'receipt', step, replayed: false, applied: applied.length, skipped: records.length - applied.length },
    gradient_norm: Math.sqrt(applied.reduce((sum, { gradient_square }) => sum + gradient_square, 0)),
    groups: { muon: { lr: 0.02 / step } },
    clipped_heads: {},
    digest: nextDigest(digest, step, records),
    durable,
    seconds: { receive: 1, queue: 0, compute: 2, send: 0.5 },
  }
}
