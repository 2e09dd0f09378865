// The values that a pickle may hold: plain ones, and tensors whose bytes lie elsewhere in the file.

/** A tensor of a file: its storage, and where in that it lies. Offset, sizes and strides are in elements. */
export type TensorValue = {
  kind: 'tensor'
  storage: StorageValue
  offset: number
  shape: readonly number[]
  strides: readonly number[]
}
/** A storage; `key` is its name in the archive. `elements` of an untyped storage are bytes. */
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

/** A pickle is damaged, or asks for something that no state dict needs; the message names it. */
export class PickleError extends Error {
  override readonly name = 'PickleError'
}

export function isKind<K extends 'tensor' | 'storage' | 'global'>(
  value: PickleValue | undefined,
  kind: K,
): value is Extract<PickleValue, { kind: K }> {
  return typeof value === 'object' && value !== null && 'kind' in value && value.kind === kind
}

/** A value in a few words of a message, however large it is, even if it contains itself. */
export function shown(value: PickleValue | undefined): string {
  if (isKind(value, 'global')) return value.name
  if (isKind(value, 'tensor') || isKind(value, 'storage')) return `a ${value.kind}`
  if (Array.isArray(value)) return `a list of ${value.length}`
  if (value instanceof Map) return `a dict of ${value.size}`
  if (value instanceof Uint8Array) return `${value.length} bytes`
  if (typeof value === 'string') return `'${value.slice(0, 80)}'`
  return String(value)
}
