import {
  type GlobalValue,
  isKind,
  PickleError,
  type PickleValue,
  type StorageValue,
  shown,
  type TensorValue,
} from './pickle-value.js'

// The functions and classes of Python that a state dict needs, and the plain value that each gives here.

const STORAGE_TYPES: Readonly<Record<string, string>> = {
  'torch.FloatStorage': 'float32',
  'torch.BFloat16Storage': 'bfloat16',
  'torch.HalfStorage': 'float16',
  'torch.DoubleStorage': 'float64',
  'torch.LongStorage': 'int64',
  'torch.IntStorage': 'int32',
  'torch.ShortStorage': 'int16',
  'torch.CharStorage': 'int8',
  'torch.ByteStorage': 'uint8',
  'torch.BoolStorage': 'bool',
  'torch.storage.UntypedStorage': 'untyped',
}
const DTYPES = new Set([
  'torch.float32',
  'torch.bfloat16',
  'torch.float16',
  'torch.float64',
  'torch.int64',
  'torch.int32',
])
const CALLS: Readonly<Record<string, (args: readonly PickleValue[]) => PickleValue>> = {
  'collections.OrderedDict': (args) => {
    // The pickle sets the items afterwards, one by one.
    if (args.length === 0) return new Map()
    throw new PickleError(`an OrderedDict is built of ${shown(args[0])}`)
  },
  'torch.Size': ([sizes = []]) => sizes,
  'torch._utils._rebuild_tensor_v2': ([storage, ...rest]) => tensor(storage, rest),
  'torch._utils._rebuild_tensor_v3': ([storage, ...rest]) => tensor(typed(storage, rest[5]), rest),
  'torch._utils._rebuild_parameter': ([data]) => data,
}

/** torch has no tensor with more dimensions. */
const MOST_DIMENSIONS = 64

/** A function or class that a pickle may name. Throws PickleError, with the name, for any other. */
export function named(module: string, name: string): GlobalValue {
  const full = `${module}.${name}`
  if (Object.hasOwn(CALLS, full) || Object.hasOwn(STORAGE_TYPES, full) || DTYPES.has(full))
    return { kind: 'global', name: full }
  throw new PickleError(
    `the file asks for ${full}, which no state dict of numbers and tensors needs: it is refused unread`,
  )
}

/** The value of `callable(*args)`. Throws PickleError for all but the functions above. */
export function result(callable: PickleValue, args: PickleValue): PickleValue {
  const work = isKind(callable, 'global') && Object.hasOwn(CALLS, callable.name) ? CALLS[callable.name] : undefined
  if (work && Array.isArray(args)) return work(args)
  throw new PickleError(`the pickle calls ${shown(callable)} with ${shown(args)}`)
}

/**
 * The storage that a pickle refers to by an id, ('storage', type, key, device, elements): its bytes lie outside of the
 * pickle. Throws PickleError for any other id.
 */
export function storage(id: PickleValue): StorageValue {
  if (Array.isArray(id)) {
    const [word, type, key, , elements] = id
    const known =
      isKind(type, 'global') && Object.hasOwn(STORAGE_TYPES, type.name) ? STORAGE_TYPES[type.name] : undefined
    if (word === 'storage' && known && typeof key === 'string' && isSize(elements))
      return { kind: 'storage', key, type: known, elements }
  }
  throw new PickleError(`the pickle refers to ${shown(id)}, expected a storage`)
}

function typed(value: PickleValue, dtype: PickleValue): PickleValue {
  if (!isKind(value, 'storage') || !isKind(dtype, 'global') || !DTYPES.has(dtype.name))
    throw new PickleError(`a tensor is built of ${shown(value)} with ${shown(dtype)}`)
  return { ...value, type: dtype.name.slice('torch.'.length) }
}

function tensor(from: PickleValue, [offset, shape, strides]: readonly PickleValue[]): TensorValue {
  if (
    isKind(from, 'storage') &&
    isSize(offset) &&
    isSizes(shape) &&
    isSizes(strides) &&
    shape.length === strides.length
  )
    return { kind: 'tensor', storage: from, offset, shape, strides }
  throw new PickleError(`a tensor is built of ${shown(from)}, ${shown(offset)}, ${shown(shape)}, ${shown(strides)}`)
}

function isSize(value: PickleValue | undefined): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0
}

function isSizes(value: PickleValue | undefined): value is number[] {
  return Array.isArray(value) && value.length <= MOST_DIMENSIONS && value.every(isSize)
}
