import { createHash } from 'node:crypto'
import type { Journal } from '../../../src/store/journal/journal.js'
import type { AppliedHead, EndHead } from '../../../src/store/journal/journal-format.js'

// Steps for journals, for tests of the store alone.

const APPLIED = {
  gradient_scale: 1,
  gradient_fingerprint: '0'.repeat(16),
  update_fingerprint: '1'.repeat(16),
  scale: -1,
  decay: 0,
}

export const gradient = (step: number, parameter: number): AppliedHead => ({
  type: 'gradient',
  step,
  parameter,
  applied: APPLIED,
})

export const payload = (step: number, parameter: number, bytes: number) =>
  new Uint8Array(bytes).fill(step * 10 + parameter)

export const digestOf = (step: number, attempt = 0) =>
  createHash('sha256')
    .update(attempt === 0 ? `step ${step}` : `step ${step}, ${attempt}`)
    .digest('hex')

/** The end of a step. Another `attempt` has another digest. */
export const end = (step: number, attempt = 0): EndHead => ({
  type: 'end',
  step,
  digest: digestOf(step, attempt),
  skipped: [],
  settings: { groups: [], frame: { groups: {}, gradient_scale: 1, max_logits: {} } },
  receipt: {
    ...{
      type: 'receipt',
      step,
      replayed: false,
      applied: 1,
      skipped: 0,
      gradient_norm: 1,
      groups: {},
      clipped_heads: {},
    },
    ...{ digest: digestOf(step, attempt), durable: true, seconds: { receive: 0, queue: 0, compute: 0, send: 0 } },
  },
})

/** Has a journal take a step whose gradients have so many bytes. */
export async function write(journal: Journal, step: number, sizes: readonly number[], attempt = 0): Promise<void> {
  for (const [parameter, bytes] of sizes.entries())
    void journal.append(gradient(step, parameter), payload(step + attempt, parameter, bytes))
  await journal.commit(end(step, attempt), [...sizes.keys()])
}
