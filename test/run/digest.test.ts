import t from 'tap'
import { type DigestRecord, FIRST_DIGEST, nextDigest } from '../../src/run/digest.js'

const RECORD: DigestRecord = {
  gradient_scale: 1,
  gradientFingerprint: 0x0123456789abcdefn,
  updateFingerprint: 2n ** 64n - 1n,
  scale: -0.02,
  decay: 0.001,
}

// From Python's hashlib and struct.pack('<IBdQQdd', …), not from this code.
t.test('known values, so that another implementation can be held against them', async (t) => {
  t.equal(FIRST_DIGEST, '264045523ea2fdaeace36e36b63301bbfdf40ef7fe9a9005211987b0600ba864')
  t.equal(nextDigest(FIRST_DIGEST, 1, []), '8dc1c1d9a34b24e54fa54af1ed00773f23f5ffa3d9d0a19632ce21fab0fd595c')
  t.equal(
    nextDigest(FIRST_DIGEST, 1, [RECORD, undefined]),
    '8143d4259cfa0a467d968c0e4a0b919ac29734f1eb0b0d5f3d837ad94d573539',
  )
})

t.test('everything that a step was made of changes the digest', async (t) => {
  const expected = nextDigest(FIRST_DIGEST, 1, [RECORD, RECORD])
  const others: Record<string, string> = {
    'the digest before': nextDigest(expected, 1, [RECORD, RECORD]),
    'the step': nextDigest(FIRST_DIGEST, 2, [RECORD, RECORD]),
    'a step beyond 2^32': nextDigest(FIRST_DIGEST, 1 + 2 ** 32, [RECORD, RECORD]),
    'a parameter less': nextDigest(FIRST_DIGEST, 1, [RECORD]),
    'the first one skipped': nextDigest(FIRST_DIGEST, 1, [undefined, RECORD]),
    'the second one skipped': nextDigest(FIRST_DIGEST, 1, [RECORD, undefined]),
    'both skipped': nextDigest(FIRST_DIGEST, 1, [undefined, undefined]),
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
    others[`the first one's ${name}`] = nextDigest(FIRST_DIGEST, 1, [{ ...RECORD, ...change }, RECORD])
    others[`the second one's ${name}`] = nextDigest(FIRST_DIGEST, 1, [RECORD, { ...RECORD, ...change }])
  }
  t.equal(
    new Set([expected, ...Object.values(others)]).size,
    Object.keys(others).length + 1,
    Object.keys(others).join(', '),
  )
  t.equal(nextDigest(FIRST_DIGEST, 1, [{ ...RECORD }, { ...RECORD }]), expected)
})
