import t from 'tap'
import { type DigestRecord, FIRST_DIGEST, nextDigest } from '../../src/run/digest.js'

const RECORD: DigestRecord = {
  gradient_scale: 1,
  gradientFingerprint: 0x0123456789abcdefn,
  updateFingerprint: 2n ** 64n - 1n,
  scale: -0.02,
  decay: 0.001,
}

// The expected digest was computed with Python's hashlib and struct.pack('<IBdQQdd', …).
t.test('known values, so that another implementation can be held against them', async (t) => {
  t.equal(FIRST_DIGEST, '264045523ea2fdaeace36e36b63301bbfdf40ef7fe9a9005211987b0600ba864')
  t.equal(nextDigest(FIRST_DIGEST, 1, []), '8dc1c1d9a34b24e54fa54af1ed00773f23f5ffa3d9d0a19632ce21fab0fd595c')
  t.equal(
    nextDigest(FIRST_DIGEST, 1, [{ applied: RECORD }, {}]),
    '8143d4259cfa0a467d968c0e4a0b919ac29734f1eb0b0d5f3d837ad94d573539',
  )
})

const scales = (...factors: number[]) => new Uint8Array(Float32Array.from(factors).buffer)

// Computed the same way, with flags 3 and 2, and with struct.pack('<I2f', 2, 0.5, 1.0) behind the record and behind the
// place of the skipped parameter.
t.test('row scales are known values too, with and without a gradient', async (t) => {
  const row_scale = scales(0.5, 1)
  t.equal(
    nextDigest(FIRST_DIGEST, 1, [{ applied: RECORD, row_scale }, { row_scale }]),
    '9997c8ca5e59f0220706f33ac14c1cc4df8b55ad44b2ecea417599cd141330eb',
  )
})

t.test('everything that a step was made of changes the digest', async (t) => {
  const record = { applied: RECORD }
  const expected = nextDigest(FIRST_DIGEST, 1, [record, record])
  const others: Record<string, string> = {
    'the digest before': nextDigest(expected, 1, [record, record]),
    'the step': nextDigest(FIRST_DIGEST, 2, [record, record]),
    'a step beyond 2^32': nextDigest(FIRST_DIGEST, 1 + 2 ** 32, [record, record]),
    'a parameter less': nextDigest(FIRST_DIGEST, 1, [record]),
    'the first one skipped': nextDigest(FIRST_DIGEST, 1, [{}, record]),
    'the second one skipped': nextDigest(FIRST_DIGEST, 1, [record, {}]),
    'both skipped': nextDigest(FIRST_DIGEST, 1, [{}, {}]),
    'the first one scaled': nextDigest(FIRST_DIGEST, 1, [{ ...record, row_scale: scales(0.5, 1) }, record]),
    'the second one scaled': nextDigest(FIRST_DIGEST, 1, [record, { ...record, row_scale: scales(0.5, 1) }]),
    'scaled otherwise': nextDigest(FIRST_DIGEST, 1, [record, { ...record, row_scale: scales(1, 0.5) }]),
    'skipped and scaled': nextDigest(FIRST_DIGEST, 1, [record, { row_scale: scales(0.5, 1) }]),
  }
  const changes: Partial<DigestRecord>[] = [
    { gradient_scale: 0.5 },
    { gradientFingerprint: RECORD.gradientFingerprint + 1n },
    { updateFingerprint: 0n },
    { scale: 0.02 },
    { decay: 0 },
  ]
  for (const change of changes) {
    const [name] = Object.keys(change)
    const changed = { applied: { ...RECORD, ...change } }
    others[`the first one's ${name}`] = nextDigest(FIRST_DIGEST, 1, [changed, record])
    others[`the second one's ${name}`] = nextDigest(FIRST_DIGEST, 1, [record, changed])
  }
  t.equal(
    new Set([expected, ...Object.values(others)]).size,
    Object.keys(others).length + 1,
    Object.keys(others).join(', '),
  )
  t.equal(nextDigest(FIRST_DIGEST, 1, [{ applied: { ...RECORD } }, { applied: { ...RECORD } }]), expected)
})
