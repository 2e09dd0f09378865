import { createHash } from 'node:crypto'
import type { RunRecord } from '../../src/store/checkpoint/manifest.js'
import type { StateEntry } from '../../src/store/checkpoint/state-files.js'
import type { Snapshot } from '../../src/store/run-store.js'

// Checkpoints to be written, for tests of the store alone.

const sha256 = (text: string) => createHash('sha256').update(text).digest('hex')
const RECORD: RunRecord = {
  ...{
    run: 'r',
    created_at: '2026-01-01T00:00:00.000Z',
    epoch: 1,
    step: 0,
    digest: sha256('0'),
    previous_digest: sha256(''),
  },
  parameters: [{ name: 'w', shape: [2], group: 'g' }],
  attentions: [],
  groups: [{ name: 'g', algorithm: 'sgd', given: {}, hyperparameters: { lr: 0.5 } }],
  places: [{ count: 0, applied_step: 0, gradient_square: 0 }],
}
/** A tensor of zeros. */
export const inline = (name: string, bytes: number): StateEntry => ({
  name,
  dtype: 'F32',
  shape: [bytes / 4],
  inline: new Uint8Array(bytes),
})
/** A checkpoint of a run `r`. */
export const snapshot = (step: number, more: Partial<Snapshot> = {}): Snapshot => ({
  ...{ tags: [], server: '0', device: { kind: 'cpu', name: 'cpu', onnxruntime: '1', processor: '' } },
  record: { ...RECORD, step, digest: sha256(String(step)) },
  ...{ entries: [inline('a', 8)], locations: [{ kind: 'host' }], file_bytes: 1000 },
  ...more,
})
