import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

/** The bytes to train on and the bytes to validate on, from `files` files. */
export type Corpus = { train: Uint8Array; validation: Uint8Array; files: number }

/** A batch of a model: the bytes that it reads (`tokens`) and the bytes that it has to predict (`targets`). */
export type Examples = { tokens: BigInt64Array; targets: BigInt64Array }

const FOLDERS = ['kernels', 'src', 'test', 'examples', 'docs'] as const
const VALIDATION_FRACTION = 0.1

/**
 * Reads this repository's own TypeScript and Markdown. The last tenth of every file is for validation, so both parts
 * have the same kinds of text: with whole files for validation, a model of kernels might be judged on tests.
 */
export function readCorpus(root: string): Corpus {
  const texts = FOLDERS.flatMap((folder) => sourcesIn(join(root, folder))).map((path) => readFileSync(path))
  const cuts = texts.map((text) => Math.floor(text.length * (1 - VALIDATION_FRACTION)))
  return {
    train: Buffer.concat(texts.map((text, i) => text.subarray(0, cuts[i]))),
    validation: Buffer.concat(texts.map((text, i) => text.subarray(cuts[i]))),
    files: texts.length,
  }
}

/**
 * Examples: the targets [positions] are the bytes at `positions`, the tokens [positions, context] the bytes before
 * each of them. Every position has to be at least `context`.
 */
export function examplesAt(bytes: Uint8Array, positions: Int32Array, context: number): Examples {
  const tokens = new BigInt64Array(positions.length * context)
  positions.forEach((position, i) => {
    for (let k = 0; k < context; k++) tokens[i * context + k] = BigInt(bytes[position - context + k])
  })
  return { tokens, targets: BigInt64Array.from([...positions], (position) => BigInt(bytes[position])) }
}

/**
 * Sequences: the `context` bytes before each position, and the byte behind each of these; both [positions * context].
 */
export function windowsAt(bytes: Uint8Array, positions: Int32Array, context: number): Examples {
  const at = (shift: number) =>
    BigInt64Array.from({ length: positions.length * context }, (_, i) => {
      return BigInt(bytes[positions[Math.floor(i / context)] - context + shift + (i % context)])
    })
  return { tokens: at(0), targets: at(1) }
}

/** `count` random positions, uniform over those that have a whole context before them. */
export function randomPositions(random: () => number, bytes: Uint8Array, of: { count: number; context: number }) {
  const room = bytes.length - of.context
  return Int32Array.from({ length: of.count }, () => of.context + Math.floor(random() * room))
}

/** `count` positions spread evenly over `bytes`: the same in every evaluation of every run. */
export function fixedPositions(bytes: Uint8Array, of: { count: number; context: number }) {
  const room = bytes.length - of.context
  return Int32Array.from({ length: of.count }, (_, i) => of.context + Math.floor((i * room) / of.count))
}

/** Uniform numbers in [0, 1) that depend on `seed` only (mulberry32 by Tommy Ettinger, public domain). */
export function seededRandom(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

// Sorted, because the order in which a file system lists its entries would otherwise decide the result. Generated
// declarations are left out: nobody wrote them.
function sourcesIn(folder: string): string[] {
  return readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .filter((name) => /\.(ts|md)$/.test(name) && !name.endsWith('.d.ts'))
    .sort()
    .map((name) => join(folder, name))
}
