import fc from 'fast-check'
import t from 'tap'
import { bytesPerElement, DTYPES, type Dtype } from '../../../kernels/dtype.js'
import { createScanner } from '../../../src/device/cpu/scan.js'
import { instantiate } from '../../../src/device/cpu/wasm.js'

const scanner = createScanner()
const dtypes = Object.keys(DTYPES) as Dtype[]
const WINDOW = 65_536

// Bit patterns with a meaning of their own, each as [sign bit off, value].
const SPECIAL: Record<Dtype, { infinity: number; largest: number; smallest: number; values: [number, number][] }> = {
  float32: {
    infinity: 0x7f800000,
    largest: 0x7f7fffff,
    smallest: 1,
    values: [
      [0x3f800000, 1],
      [0x007fffff, 8388607 * 2 ** -149],
      [0x00800000, 2 ** -126],
    ],
  },
  bfloat16: {
    infinity: 0x7f80,
    largest: 0x7f7f,
    smallest: 1,
    values: [
      [0x3f80, 1],
      [0x007f, 127 * 2 ** -133],
      [0x0080, 2 ** -126],
    ],
  },
  float16: {
    infinity: 0x7c00,
    largest: 0x7bff,
    smallest: 1,
    values: [
      [0x3c00, 1],
      [0x03ff, 1023 * 2 ** -24],
      [0x0400, 2 ** -14],
      [0x7bff, 65504],
    ],
  },
}

t.test('the fingerprint is the sum of the mixed words and of the mixed length', async (t) => {
  for (const length of [
    0,
    2,
    4,
    6,
    8,
    10,
    62,
    64,
    66,
    130,
    4094,
    WINDOW - 8,
    WINDOW - 2,
    WINDOW,
    WINDOW + 2,
    WINDOW + 64,
  ]) {
    const bytes = randomBytes(length, length + 1)
    t.equal(scanner.scan(bytes, 'bfloat16').fingerprint, fingerprint(bytes), `${length} bytes`)
  }
  const long = randomBytes(3 * WINDOW + 68, 5)
  for (const dtype of dtypes) t.equal(scanner.scan(long, dtype).fingerprint, fingerprint(long), `${dtype} over windows`)
})

t.test('known values, so that another device can be held against them', async (t) => {
  t.equal(scanner.scan(new Uint8Array(0), 'float32').fingerprint, 0n)
  const ramp = Uint8Array.from({ length: 20 }, (_, i) => i)
  t.equal(scanner.scan(ramp, 'float32').fingerprint, 0xf2f3be2091a89c98n)
})

t.test('every single bit and its position matter', async (t) => {
  const bytes = randomBytes(76, 7)
  const seen = new Set([scanner.scan(bytes, 'float16').fingerprint])
  for (let bit = 0; bit < bytes.length * 8; bit++) {
    bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) ^ (1 << (bit & 7))
    seen.add(scanner.scan(bytes, 'float16').fingerprint)
    bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) ^ (1 << (bit & 7))
  }
  t.equal(seen.size, 76 * 8 + 1)
})

t.test('swapped words and appended zeros change the fingerprint', async (t) => {
  const bytes = randomBytes(256, 11)
  const expected = scanner.scan(bytes, 'float32').fingerprint
  for (let i = 0; i < 32; i++) {
    for (let j = 0; j < i; j++) {
      const words = new BigUint64Array(bytes.slice().buffer)
      const [a, b] = [words[i] ?? 0n, words[j] ?? 0n]
      words[i] = b
      words[j] = a
      t.not(scanner.scan(new Uint8Array(words.buffer), 'float32').fingerprint, expected, `${i} and ${j}`)
    }
  }
  const zeros = Array.from({ length: 40 }, (_, n) => scanner.scan(new Uint8Array(2 * n), 'float16').fingerprint)
  t.equal(new Set(zeros).size, 40)
})

t.test('NaN and both infinities are found wherever they stand, the largest finite value is not one', async (t) => {
  for (const dtype of dtypes) {
    const { infinity, largest } = SPECIAL[dtype]
    const width = bytesPerElement(dtype)
    const sign = 2 ** (8 * width - 1)
    const places = [
      0,
      1,
      2,
      3,
      4,
      5,
      6,
      7,
      15,
      16,
      31,
      33,
      WINDOW / width - 1,
      WINDOW / width,
      (WINDOW + 72) / width - 1,
    ]
    const bytes = new Uint8Array(WINDOW + 72)
    for (const place of places) {
      for (const pattern of [infinity, infinity + sign, infinity + 1, largest + sign, sign - 1, 2 * sign - 1]) {
        put(bytes, dtype, place, pattern)
        t.equal(
          scanner.scan(bytes, dtype).finite,
          pattern === largest + sign,
          `${dtype} ${pattern.toString(16)} at ${place}`,
        )
      }
      put(bytes, dtype, place, 0)
    }
    t.ok(scanner.scan(bytes, dtype).finite, `${dtype}: nothing of it is kept for the next tensor`)
  }
})

t.test('special values have the square they should have, at every place of a block', async (t) => {
  for (const dtype of dtypes) {
    const width = bytesPerElement(dtype)
    const sign = 2 ** (8 * width - 1)
    for (const [pattern, value] of SPECIAL[dtype].values) {
      for (const place of [0, 1, 2, 3, 4, 5, 6, 7, 13, 16, 17]) {
        const bytes = new Uint8Array(72)
        put(bytes, dtype, place, pattern + (place % 2) * sign)
        t.equal(scanner.scan(bytes, dtype).squareSum, value * value, `${dtype} ${pattern.toString(16)} at ${place}`)
      }
    }
  }
})

t.test('every float16 and bfloat16 is decoded exactly', async (t) => {
  for (const dtype of ['float16', 'bfloat16'] as const) {
    const bytes = new Uint8Array(2)
    const wrong: number[] = []
    for (let pattern = 0; pattern < 65_536; pattern++) {
      put(bytes, dtype, 0, pattern)
      const { finite, squareSum } = scanner.scan(bytes, dtype)
      const value = decode(bytes, dtype)[0] ?? 0
      if (finite !== Number.isFinite(value) || (finite && squareSum !== value * value)) wrong.push(pattern)
    }
    t.same(wrong, [], dtype)
  }
})

t.test('squares neither overflow nor vanish from 1e-30 to 1e30', async (t) => {
  for (const scale of [1e-30, 1e-20, 1, 1e20, 1e30]) {
    const values = Float32Array.from({ length: 40_000 }, (_, i) => Math.sin(i) * scale)
    const { squareSum, finite } = scanner.scan(new Uint8Array(values.buffer), 'float32')
    const expected = values.reduce((sum, x) => sum + x * x, 0)
    t.ok(finite)
    t.ok(Math.abs(squareSum / expected - 1) < 1e-12, `${squareSum} is ${expected}`)
  }
})

t.test(
  'any tensor: fingerprint, finiteness and square sum are the oracle’s, whatever the alignment and the memory',
  async () => {
    const input = fc.record({
      dtype: fc.constantFrom(...dtypes),
      seed: fc.nat(),
      elements: fc.oneof(fc.nat({ max: 200 }), fc.integer({ min: WINDOW / 4 - 20, max: WINDOW / 2 + 20 })),
      shift: fc.nat({ max: 17 }),
      tame: fc.boolean(),
    })
    fc.assert(
      fc.property(input, ({ dtype, seed, elements, shift, tame }) => {
        const bytes = randomBytes(elements * bytesPerElement(dtype), seed, tame ? 0xbf : 0xff)
        const moved = new Uint8Array(new SharedArrayBuffer(bytes.length + shift), shift)
        moved.set(bytes)
        const result = scanner.scan(moved, dtype)
        const values = decode(bytes, dtype)
        const expected = values.reduce((sum, x) => sum + x * x, 0)
        const again = createScanner().scan(bytes, dtype)
        return (
          result.fingerprint === fingerprint(bytes) &&
          result.finite === values.every(Number.isFinite) &&
          (!result.finite || Math.abs(result.squareSum - expected) <= 1e-12 * expected) &&
          Object.is(again.squareSum, result.squareSum)
        )
      }),
      { seed: 3, numRuns: 150 },
    )
  },
)

t.test('a tensor that ends inside an element is refused', async (t) => {
  t.throws(() => scanner.scan(new Uint8Array(6), 'float32'), new RangeError('a float32 tensor cannot have 6 bytes'))
  t.throws(() => scanner.scan(new Uint8Array(3), 'bfloat16'), new RangeError('a bfloat16 tensor cannot have 3 bytes'))
})

t.test('a module without what is asked of it is refused', async (t) => {
  const empty = Uint8Array.from([0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00])
  t.throws(() => instantiate(empty), new TypeError('the WebAssembly module exports no memory'))
  const memoryOnly = Uint8Array.from([...empty, 5, 3, 1, 0, 1, 7, 10, 1, 6, ...Buffer.from('memory'), 2, 0])
  t.throws(
    () => instantiate(memoryOnly).entry('run'),
    new TypeError("the WebAssembly module exports no function 'run'"),
  )
})

/** protocol.md, Fingerprint, word by word. */
function fingerprint(bytes: Uint8Array): bigint {
  const padded = new Uint8Array(Math.ceil(bytes.length / 8) * 8)
  padded.set(bytes)
  const words = new BigUint64Array(padded.buffer)
  let sum = mix(BigInt(bytes.length))
  words.forEach((word, i) => {
    sum += mix(BigInt.asUintN(64, word + BigInt(i + 1) * 0x9e3779b97f4a7c15n))
  })
  return BigInt.asUintN(64, sum)
}

function mix(word: bigint): bigint {
  let x = word
  x ^= x >> 32n
  x = BigInt.asUintN(64, x * 0xd6e8feb86659fd93n)
  x ^= x >> 29n
  x = BigInt.asUintN(64, x * 0xa0761d6478bd642fn)
  return x ^ (x >> 32n)
}

function decode(bytes: Uint8Array, dtype: Dtype): number[] {
  const copy = bytes.slice().buffer
  if (dtype === 'float32') return [...new Float32Array(copy)]
  const halves = [...new Uint16Array(copy)]
  if (dtype === 'bfloat16') return [...new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer)]
  return halves.map((half) => {
    const [sign, exponent, fraction] = [half >> 15 ? -1 : 1, (half >> 10) & 31, half & 1023]
    if (exponent === 31) return fraction === 0 ? sign * Infinity : Number.NaN
    return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15))
  })
}

function put(bytes: Uint8Array, dtype: Dtype, place: number, pattern: number): void {
  const view = new DataView(bytes.buffer)
  if (dtype === 'float32') view.setUint32(4 * place, pattern, true)
  else view.setUint16(2 * place, pattern, true)
}

/** xorshift32 bytes; `mask` 0xbf keeps every exponent below infinity's. */
function randomBytes(length: number, seed: number, mask = 0xff): Uint8Array {
  let x = (seed + 1) * 2654435761 || 1
  return Uint8Array.from({ length }, () => {
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    return x & mask
  })
}
