// What a pickle can hold here: plain values, and tensors that lie elsewhere in the file.

/** A tensor of a file: which storage it lies in, and how. Sizes and strides are in elements. */
export type TensorValue = {
  kind: 'tensor'
  storage: StorageValue
  offset: number
  shape: readonly number[]
  strides: readonly number[]
}
/** `key` is the storage's name in the archive. An untyped storage counts in bytes. */
export type StorageValue = { kind: 'storage'; key: string; type: string; elements: number }
export type GlobalValue = { kind: 'global'; name: string }
export type PickleValue =
  | null
  | boolean
  | number
  | bigint
  | string
  | Uint8Array
  | PickleValue[]
  | Map<PickleValue, PickleValue>
  | TensorValue
  | StorageValue
  | GlobalValue

/** The file is not what a state dict is saved as; the message says what it wants instead. */
export class PickleError extends Error {
  override readonly name = 'PickleError'
}

export function isKind<K extends 'tensor' | 'storage' | 'global'>(
  value: PickleValue | undefined,
  kind: K,
): value is Extract<PickleValue, { kind: K }> {
  return typeof value === 'object' && value !== null && 'kind' in value && value.kind === kind
}

/** A value in a few words: it may be large, or contain itself. */
export function shown(value: PickleValue | undefined): string {
  if (isKind(value, 'global')) return value.name
  if (isKind(value, 'tensor') || isKind(value, 'storage')) return `a ${value.kind}`
  if (Array.isArray(value)) return `a list of ${value.length}`
  if (value instanceof Map) return `a dict of ${value.size}`
  if (value instanceof Uint8Array) return `${value.length} bytes`
  if (typeof value === 'string') return `'${value.slice(0, 80)}'`
  return String(value)
}
