import fc from 'fast-check'
import t from 'tap'
import {
  FORMAT,
  type Manifest,
  openManifest,
  sealManifest,
  UnreadableError,
} from '../../../src/store/checkpoint/manifest.js'

const MANIFEST: Manifest = {
  format: FORMAT,
  checkpoint: 'step-000000000007',
  tags: ['best, "sha256": "'],
  written_at: '2026-01-02T03:04:05.678Z',
  server: '0.1.0',
  device: { kind: 'cpu', name: 'cpu', onnxruntime: '1.30.0', processor: 'a processor' },
  run: 'r',
  created_at: '2026-01-01T00:00:00.000Z',
  epoch: 3,
  step: 7,
  digest: 'ab',
  previous_digest: 'cd',
  parameters: [
    { name: 'w', shape: [2, 3], group: 'g' },
    { name: 'größe\n', shape: [], group: 'g' },
  ],
  attentions: [],
  groups: [
    { name: 'g', algorithm: 'muon', given: { lr: 0.1 }, hyperparameters: { lr: 0.1, ns_coefficients: [1, 2, 3] } },
  ],
  places: [
    { count: 7, applied_step: 7, gradient_square: 1.5 },
    { count: 0, applied_step: 0, gradient_square: 0 },
  ],
  momentum_form: { g: 'ema' },
  dtypes: { 'state.w.momentum_buffer': 'F32' },
  bytes: 24,
  files: [{ name: 'state-00001-of-00001.safetensors', bytes: 24, sha256: 'ef' }],
}

const TEXT = sealManifest(MANIFEST)

t.test('a manifest is JSON that comes back as it was', async (t) => {
  t.same(openManifest(TEXT, 'm'), { ...MANIFEST, sha256: JSON.parse(TEXT).sha256 })
  t.match(JSON.parse(TEXT), MANIFEST)
})

t.test('a manifest that is cut off anywhere is refused', async (t) => {
  const bytes = Buffer.from(TEXT)
  for (let length = 0; length < bytes.length; length++) {
    t.throws(() => openManifest(bytes.subarray(0, length).toString(), 'm'), UnreadableError)
  }
})

t.test('a manifest with another byte anywhere is refused, and both hashes are named where there are two', async (t) => {
  const bytes = Buffer.from(TEXT)
  const sealed = bytes.length - 'ab'.repeat(32).length - '"\n}\n'.length
  fc.assert(
    fc.property(fc.nat(bytes.length - 1), fc.integer({ min: 1, max: 255 }), (at, change) => {
      const damaged = Buffer.from(bytes)
      damaged[at]! ^= change
      t.throws(() => openManifest(damaged.toString(), 'm'), UnreadableError)
    }),
    { numRuns: 300, seed: 5 },
  )
  const damaged = Buffer.from(bytes)
  damaged[sealed - 100]! ^= 1
  t.throws(() => openManifest(damaged.toString(), 'm'), {
    message: /^m has SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}$/,
  })
})

t.test('a manifest of another format is refused by its number', async (t) => {
  t.throws(() => openManifest(sealManifest({ ...MANIFEST, format: 99 }), 'm'), {
    message: `m has format 99, this version reads ${FORMAT}`,
  })
})
