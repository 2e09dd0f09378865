/**
 * The fingerprint of a tensor's bytes (docs/protocol.md, Fingerprint). The bytes are words w_i of 64 bits,
 * little-endian, the last one padded with zeros; all arithmetic is modulo 2^64:
 *
 *     fingerprint = mix(byte length) + Σ mix(w_i + (i + 1)·step)
 *     mix(x): x ^= x >>> 32; x *= first; x ^= x >>> 29; x *= second; x ^= x >>> 32
 *
 * mix is a bijection, so a changed word always changes its addend, and a sum may be taken in any order on any device.
 * `step` is 2^64 / golden ratio; `first` is from degski's 64-bit mixer, `second` from Wang's wyhash.
 */
export const FINGERPRINT = {
  step: 0x9e3779b97f4a7c15n,
  first: 0xd6e8feb86659fd93n,
  second: 0xa0761d6478bd642fn,
  /** What a word is shifted by before, between and after the two products. */
  shifts: [32n, 29n, 32n],
} as const

export function mix(word: bigint): bigint {
  const { first, second, shifts } = FINGERPRINT
  let x = word ^ (word >> shifts[0])
  x = BigInt.asUintN(64, x * first)
  x ^= x >> shifts[1]
  x = BigInt.asUintN(64, x * second)
  return x ^ (x >> shifts[2])
}
