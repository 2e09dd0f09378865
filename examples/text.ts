import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

/** Bytes to learn from and bytes to be judged on; `files` is how many sources they come from. */
export type Corpus = { train: Uint8Array; validation: Uint8Array; files: number }

/** What one batch feeds a model: bytes to read and bytes to guess. */
export type Examples = { tokens: BigInt64Array; targets: BigInt64Array }

const FOLDERS = ['kernels', 'src', 'test', 'examples', 'docs'] as const
const VALIDATION_FRACTION = 0.1

/**
 * Reads this repository's own TypeScript and Markdown. The last tenth of every file is held out, so both parts hold
 * the same kinds of text: holding out whole files would compare kernels with tests.
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
 * The contexts [positions, context] before the target bytes [positions] that stand at `positions` of `bytes`; every position is
 * at least `context`.
 */
export function examplesAt(bytes: Uint8Array, positions: Int32Array, context: number): Examples {
  const tokens = new BigInt64Array(positions.length * context)
  positions.forEach((position, i) => {
    for (let k = 0; k < context; k++) tokens[i * context + k] = BigInt(bytes[position - context + k])
  })
  return { tokens, targets: BigInt64Array.from([...positions], (position) => BigInt(bytes[position])) }
}

/** The last `context` bytes before each of `positions`, and the byte that follows each of them: both [positions * context]. */
export function windowsAt(bytes: Uint8Array, positions: Int32Array, context: number): Examples {
  const at = (shift: number) =>
    BigInt64Array.from({ length: positions.length * context }, (_, i) => {
      return BigInt(bytes[positions[Math.floor(i / context)] - context + shift + (i % context)])
    })
  return { tokens: at(0), targets: at(1) }
}

/** `count` positions drawn evenly from those that have a whole context before them. */
export function randomPositions(random: () => number, bytes: Uint8Array, of: { count: number; context: number }) {
  const room = bytes.length - of.context
  return Int32Array.from({ length: of.count }, () => of.context + Math.floor(random() * room))
}

/** The same positions for every evaluation of every run: spread evenly over `bytes`. */
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
