import type { Pointer } from '../../device/onnx/onnxruntime.js'
import { encodeHeader, type SafetensorsDtype } from '../safetensors.js'

/** A tensor in a unit's state memory. */
export type Placed = { unit: number; pointer: Pointer; bytes: number }

/** A tensor of a state file: where its bytes lie, or the bytes themselves where they are a few. */
export type StateEntry = {
  name: string
  dtype: SafetensorsDtype
  shape: readonly number[]
} & ({ placed: Placed } | { inline: Uint8Array })

/** A safetensors file to be written: its header, then the bytes of its entries in order. */
export type StateFile = { name: string; header: Uint8Array; entries: readonly StateEntry[] }

/**
 * Shares tensors out to files named as Hugging Face's shards are, `state-00001-of-00002.safetensors`, in the order given. A file
 * has at most `most` bytes of tensors, unless one alone has more.
 */
export function planFiles(entries: readonly StateEntry[], most: number): StateFile[] {
  const shares = shareOut(entries, bytesOf, most)
  return shares.map((share, i) => ({
    name: shardName('state', i, shares.length),
    header: encodeHeader(
      share.map((entry) => ({ ...entry, bytes: bytesOf(entry) })),
      { format: 'pt' },
    ),
    entries: share,
  }))
}

/** Lists in the order given, of at most `most` bytes each, unless one entry alone has more. */
export function shareOut<T>(entries: readonly T[], bytesOf: (entry: T) => number, most: number): T[][] {
  const shares: T[][] = []
  let room = most
  for (const entry of entries) {
    const bytes = bytesOf(entry)
    if (bytes > room || shares.length === 0) {
      shares.push([])
      room = most
    }
    shares.at(-1)?.push(entry)
    room -= bytes
  }
  return shares
}

/** The file name of a part, as Hugging Face's libraries have it. */
export function shardName(stem: string, part: number, parts: number): string {
  const number = (value: number) => String(value).padStart(5, '0')
  return `${stem}-${number(part + 1)}-of-${number(parts)}.safetensors`
}

/** The index that Hugging Face's readers take: which file has which tensor. */
export function indexText(files: readonly StateFile[]): string {
  const all = files.flatMap(({ name: file, entries }) =>
    entries.map((entry) => ({ file, name: entry.name, bytes: bytesOf(entry) })),
  )
  return indexOf(all)
}

export function indexOf(tensors: readonly { name: string; file: string; bytes: number }[]): string {
  const names = tensors.map(({ name, file }) => [name, file] as const)
  const total_size = tensors.reduce((sum, { bytes }) => sum + bytes, 0)
  return `${JSON.stringify({ metadata: { total_size }, weight_map: Object.fromEntries(names) }, null, 2)}\n`
}

export function bytesOf(entry: StateEntry): number {
  return 'placed' in entry ? entry.placed.bytes : entry.inline.length
}
