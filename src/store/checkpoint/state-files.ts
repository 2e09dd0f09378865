import type { Pointer } from '../../device/onnx/onnxruntime.js'
import { encodeHeader, type SafetensorsDtype } from '../safetensors.js'

/** Where a tensor lies in the state memory of a unit of the device. */
export type TensorLocation = { unit: number; pointer: Pointer; bytes: number }

/** A tensor to be written: `placed` says where its bytes lie, `inline` are the bytes of a small one. */
export type StateEntry = {
  name: string
  dtype: SafetensorsDtype
  shape: readonly number[]
} & ({ placed: TensorLocation } | { inline: Uint8Array })

/** A safetensors file to be written with a part of a state: its header, then the bytes of its entries in order. */
export type StateShard = { name: string; header: Uint8Array; entries: readonly StateEntry[] }

/**
 * Shares tensors out to files, in the order given. The names are those of Hugging Face's shards,
 * `state-00001-of-00002.safetensors`. A file has at most `most` bytes of tensors, unless one tensor alone has more.
 */
export function planShards(entries: readonly StateEntry[], most: number): StateShard[] {
  const shares = shareOut(entries, entryBytes, most)
  return shares.map((share, i) => ({
    name: shardName('state', i, shares.length),
    header: encodeHeader(
      share.map((entry) => ({ ...entry, bytes: entryBytes(entry) })),
      { format: 'pt' },
    ),
    entries: share,
  }))
}

/** Cuts a list into lists of at most `most` bytes each, unless one entry alone has more. The order stays. */
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

/** The file name of part `part`, from 0, of `parts`, as Hugging Face's libraries write it. */
export function shardName(stem: string, part: number, parts: number): string {
  const number = (value: number) => String(value).padStart(5, '0')
  return `${stem}-${number(part + 1)}-of-${number(parts)}.safetensors`
}

/** The index that Hugging Face's readers want, `<stem>.safetensors.index.json`: which shard has which tensor. */
export function indexText(files: readonly StateShard[]): string {
  const all = files.flatMap(({ name: file, entries }) =>
    entries.map((entry) => ({ file, name: entry.name, bytes: entryBytes(entry) })),
  )
  return tensorIndexText(all)
}

/** `indexText` of tensors whose files are known by name. */
export function tensorIndexText(tensors: readonly { name: string; file: string; bytes: number }[]): string {
  const names = tensors.map(({ name, file }) => [name, file] as const)
  const total_size = tensors.reduce((sum, { bytes }) => sum + bytes, 0)
  return `${JSON.stringify({ metadata: { total_size }, weight_map: Object.fromEntries(names) }, null, 2)}\n`
}

export function entryBytes(entry: StateEntry): number {
  return 'placed' in entry ? entry.placed.bytes : entry.inline.length
}
