import { createHash } from 'node:crypto'
import fc from 'fast-check'
import t from 'tap'
import {
  FORMAT,
  type Manifest,
  openManifest,
  sealManifest,
  UnreadableError,
} from '../../../src/store/checkpoint/manifest.js'
import { changed, wrongFields } from '../wrong-fields.js'

const sha256 = (text: string) => createHash('sha256').update(text).digest('hex')
const GROUP = {
  name: 'g',
  algorithm: 'muon',
  preset: 'torch',
  given: { lr: 0.1 },
  hyperparameters: { lr: 0.1, ns_coefficients: [1, 2, 3] },
}
const APPLIED = {
  gradient_scale: 0.5,
  gradient_fingerprint: '0123456789abcdef',
  update_fingerprint: 'fedcba9876543210',
}

/** Every field that a manifest may have. */
const MANIFEST = {
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
  digest: sha256('digest'),
  previous_digest: sha256('previous'),
  parameters: [
    { name: 'w', shape: [2, 3], group: 'g', gradient_dtype: 'float32', update_dtype: 'float16', split: [1, 1] },
    { index: 1, name: 'größe\n', shape: [], group: 'g', heads: 2, matrices: 'batch' },
  ],
  attentions: [
    {
      ...{ name: 'a', threshold: 100, rule: 'mha', query_heads: 2, key_value_heads: 1, head_dim: 4 },
      ...{ nope_dim: 1, rope_dim: 0, value_dim: 0, query: { parameter: 0, first_row: 1 }, key: { parameter: 0 } },
      ...{ query_bias: { parameter: 1 }, key_bias: { parameter: 1 } },
    },
  ],
  groups: [GROUP],
  last: {
    groups: [GROUP],
    frame: { groups: { g: { lr: 0.1 } }, gradient_scale: 0.5, max_logits: { a: [null, 5] } },
  },
  receipt: {
    ...{ type: 'receipt', step: 7, replayed: false, applied: 1, skipped: 1, gradient_norm: 2, groups: { g: {} } },
    ...{ clipped_heads: { a: 1 }, max_logit: 5, digest: sha256('digest'), durable: true },
    seconds: { receive: 0.1, queue: 0, compute: 0.2, send: 0 },
  },
  places: [
    { count: 7, applied_step: 7, gradient_square: 1.5, last: { ...APPLIED, scale: -0.1, decay: 0 } },
    { count: 0, applied_step: 0, gradient_square: 0 },
  ],
  imported: { step_digest: sha256('step'), hashes: [[sha256('tensor')], []] },
  momentum_form: { g: 'ema' },
  dtypes: { 'state.w.momentum_buffer': 'F32' },
  bytes: 24,
  files: [{ name: 'state-00001-of-00001.safetensors', bytes: 24, sha256: sha256('file') }],
} satisfies Manifest

const TEXT = sealManifest(MANIFEST)

t.test('a manifest is JSON that comes back as it was', async (t) => {
  t.same(openManifest(TEXT, 'm'), MANIFEST)
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

/** What a client may say as it likes: hyperparameters are held against their algorithm when the run is restored. */
const FREE = /\.(given|hyperparameters)\.|^last\.frame\.groups\.g\.|^groups\.g/
/** Numbers that may be below 0, or null as JSON writes an infinity. */
const SIGNED = /gradient_scale|scale|decay|max_logit|seconds/

t.test('each field is of its type and in its range, whatever the hash says', async (t) => {
  const isRight = (path: string, value: unknown) =>
    FREE.test(path) || (SIGNED.test(path) && (value === -1.5e308 || (value === null && /max_logits/.test(path))))
  for (const { path, value, record } of wrongFields(MANIFEST, isRight)) {
    const attempt = () => openManifest(sealManifest(record as Manifest), 'm')
    t.throws(attempt, { name: 'UnreadableError' }, `${path} ${JSON.stringify(value)}`)
    if (path !== 'format') t.throws(attempt, { message: new RegExp(`^m: ${path.replace(/[.[\]]/g, '\\$&')} is `) })
  }
})

t.test('a field that lacks or is unknown, and fields that do not agree, are refused by name', async (t) => {
  const { last: _, ...rest } = MANIFEST
  const { server: __, ...lacking } = MANIFEST
  t.same(openManifest(sealManifest(rest), 'm').last, undefined)
  const cases: [object, string][] = [
    [lacking, 'server is undefined, expected a text'],
    [{ ...MANIFEST, other: 1 }, 'other is unknown'],
    [{ ...MANIFEST, digest: 'x'.repeat(200) }, `digest is "${'x'.repeat(79)}…, expected a SHA-256`],
    [changed(MANIFEST, ['device', 'other'], () => 1), 'device.other is unknown'],
    [changed(MANIFEST, ['places', 0, 'last', 'other'], () => 1), 'places[0].last.other is unknown'],
    [{ ...MANIFEST, tags: ['step-000000000001'] }, 'tags[0] is "step-000000000001", expected 1 to 128 characters'],
    [{ ...MANIFEST, tags: [''] }, 'tags[0] is "", expected 1 to 128 characters'],
    [{ ...MANIFEST, checkpoint: '../7' }, 'checkpoint is "../7", expected the id of a checkpoint'],
    [{ ...MANIFEST, digest: 'ab' }, 'digest is "ab", expected a SHA-256'],
    [{ ...MANIFEST, written_at: 'today' }, 'written_at is "today", expected an RFC 3339 time'],
    [
      changed(MANIFEST, ['files', 0, 'name'], () => '../../file'),
      'files[0].name is "../../file", expected the name of a file',
    ],
    [
      changed(MANIFEST, ['places', 0, 'last', 'update_fingerprint'], () => '1'),
      'places[0].last.update_fingerprint is "1"',
    ],
    [{ ...MANIFEST, dtypes: { w: 'F99' } }, 'dtypes.w is "F99", expected "F32" or'],
    [{ ...MANIFEST, momentum_form: { g: 'x' } }, 'momentum_form.g is "x", expected "ema" or "heavy_ball"'],
    [{ ...MANIFEST, places: MANIFEST.places.slice(1) }, 'the number of places is 1, expected 2'],
    [{ ...MANIFEST, imported: { ...MANIFEST.imported, hashes: [] } }, 'the number of imported.hashes is 0, expected 2'],
    [{ ...MANIFEST, bytes: 25 }, 'bytes is 25, expected 24'],
    [changed(MANIFEST, ['receipt', 'step'], () => 6), 'receipt.step is 6, expected 7'],
    [changed(MANIFEST, ['places', 1, 'applied_step'], () => 8), 'the last applied_step is 8, expected 7'],
  ]
  for (const [manifest, problem] of cases) {
    const attempt = () => openManifest(sealManifest(manifest as Manifest), 'm')
    t.throws(attempt, { name: 'UnreadableError' }, problem)
    try {
      attempt()
    } catch (error) {
      t.ok(String(error).includes(`m: ${problem}`), `${error}`)
    }
  }
})
