import type { Entry } from '../../../src/cluster/commit-log.js'
import type { WholeCheckpoint, WholeRecord } from '../../../src/cluster/head/whole-store.js'
import { receiptOf, recordOf } from '../records.js'

export const RECORD: WholeRecord = {
  run: 'gpt',
  created_at: '2026-01-01T00:00:00.000Z',
  groups: [{ name: 'all', algorithm: 'sgd', lr: 0.5 }],
  parameters: [{ name: 'a', shape: [2], group: 'all' }],
  attentions: [],
  shards: [{ peer: 'http://127.0.0.1:8787', parameters: [0] }],
}

/** The commit of a step at its position in the log of a head that has begun once. */
export function entryAt(position: number, head = 'the head'): Entry {
  const step = position
  const receipt = JSON.parse(JSON.stringify(receiptOf(step, { digest: 'before', records: [recordOf(0, step)] })))
  const standing = { step, digest: receipt.digest, shards: [`shard ${step}`], receipt }
  return { ...standing, position, kind: 'commit', generation: 1, head }
}

/** An entry with which a head begins. */
export function beginAt(position: number, step: number, generation = position): Entry {
  const standing = { step, digest: `digest ${step}`, shards: [`shard ${step}`] }
  return { ...standing, position, kind: 'begin', generation, head: `head ${generation}` }
}

export function checkpointAt(step: number, head = 1): WholeCheckpoint {
  return { checkpoint: `${step}-${head}-0`, step, digest: `digest ${step}`, shards: [`step-${step}`] }
}

/** A text with one other byte in its middle. */
export function flipped(text: Buffer): Buffer {
  const wrong = Buffer.from(text)
  wrong[wrong.length >> 1]! ^= 1
  return wrong
}
