import type { FileHandle } from 'node:fs/promises'
import type { GivenDtype } from '../../store/elements.js'
import { readRange } from '../../store/file-bytes.js'
import { ELEMENT_BYTES } from '../array-layout.js'

/** A tensor in a file. Its first element is at byte `at`; strides are in elements, `dtype` is torch's name. */
export type FileTensor = {
  file: FileHandle
  dtype: string
  at: number
  shape: readonly number[]
  strides: readonly number[]
}

/** The state of one parameter in a file of another optimizer. */
export type ForeignState = {
  /** The parameter's index or name in the file, for messages and for a map of names. */
  key: string
  /** The parameter's name, where the file has names. */
  name: string | undefined
  tensors: ReadonlyMap<string, FileTensor>
  /** How many updates were applied to the parameter, where the file says it. */
  count: number | undefined
}

/** A file of another optimizer cannot be read; the message names the file and says what is wrong. */
export class ForeignError extends Error {
  override readonly name = 'ForeignError'
}

const GIVEN: Readonly<Record<string, GivenDtype>> = { float32: 'F32', bfloat16: 'BF16', float16: 'F16' }
/** Most bytes of a tensor that is not in C order: it is put in order in memory. */
const MOST_GATHERED_BYTES = 2 ** 32

/** A state tensor's type by its name in safetensors. Throws ForeignError for a type that no state may have. */
export function givenDtype({ dtype }: FileTensor, what: string): GivenDtype {
  if (Object.hasOwn(GIVEN, dtype)) return GIVEN[dtype]
  throw new ForeignError(`${what} is ${dtype}, expected one of ${Object.keys(GIVEN).join(', ')}`)
}

export function elementsOf({ shape }: Pick<FileTensor, 'shape'>): number {
  return shape.reduce((product, size) => product * size, 1)
}

/** The bytes of a tensor's elements. Throws ForeignError for an unknown type. */
export function tensorBytes(tensor: FileTensor, what: string): number {
  return sizeOf(tensor, what) * elementsOf(tensor)
}

/** The number in a tensor of one element, such as torch's `step`. Throws ForeignError. */
export async function readNumber(tensor: FileTensor, what: string): Promise<number> {
  if (elementsOf(tensor) !== 1) throw new ForeignError(`${what} has shape [${tensor.shape}], expected one number`)
  const bytes = Buffer.alloc(8)
  await tensor.file.read(bytes, 0, sizeOf(tensor, what), tensor.at)
  switch (tensor.dtype) {
    case 'float32':
      return bytes.readFloatLE()
    case 'float64':
      return bytes.readDoubleLE()
    case 'int64':
      return Number(bytes.readBigInt64LE())
    case 'int32':
      return bytes.readInt32LE()
    default:
      throw new ForeignError(`${what} is ${tensor.dtype}, expected a float32, float64, int64 or int32`)
  }
}

/** A tensor's bytes in C order. Throws ForeignError where the file ends before. */
export async function* readTensor(tensor: FileTensor, what: string): AsyncGenerator<Uint8Array> {
  const size = sizeOf(tensor, what)
  const bytes = tensorBytes(tensor, what)
  if (!isOrdered(tensor)) return yield await gathered(tensor, { size, bytes, what })
  let read = 0
  for await (const piece of readRange(tensor.file, tensor.at, tensor.at + bytes)) {
    read += piece.length
    yield piece
  }
  if (read < bytes) throw new ForeignError(`${what} has ${read} bytes in the file, expected ${bytes}`)
}

function sizeOf({ dtype }: FileTensor, what: string): number {
  if (Object.hasOwn(ELEMENT_BYTES, dtype)) return ELEMENT_BYTES[dtype]
  throw new ForeignError(`${what} is ${dtype}, expected one of ${Object.keys(ELEMENT_BYTES).join(', ')}`)
}

/** Whether a tensor is in C order. The stride of a dimension of one element does not matter. */
function isOrdered({ shape, strides }: FileTensor): boolean {
  let expected = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    if (shape[i] !== 1 && strides[i] !== expected) return false
    expected *= shape[i]
  }
  return true
}

/** The bytes of a tensor that is not in C order, put in that order. */
async function gathered(
  { file, at, shape, strides }: FileTensor,
  { size, bytes, what }: { size: number; bytes: number; what: string },
): Promise<Uint8Array> {
  const span = size * (1 + shape.reduce((sum, extent, i) => sum + (extent - 1) * strides[i], 0))
  /* c8 ignore next 4 -- needs a file of more than 4 GiB */
  if (Math.max(span, bytes) > MOST_GATHERED_BYTES)
    throw new ForeignError(
      `${what} does not lie in order and has ${bytes} bytes, at most ${MOST_GATHERED_BYTES} are put in order`,
    )
  const stored = Buffer.alloc(span)
  let read = 0
  for await (const piece of readRange(file, at, at + span)) {
    stored.set(piece, read)
    read += piece.length
  }
  if (read < span) throw new ForeignError(`${what} has ${read} bytes in the file, expected ${span}`)
  const ordered = Buffer.alloc(bytes)
  const position = shape.map(() => 0)
  for (let to = 0, from = 0; to < bytes; to += size) {
    stored.copy(ordered, to, from, from + size)
    // The next position in C order: the last dimension moves first.
    for (let i = shape.length - 1; i >= 0; i--) {
      position[i] += 1
      from += strides[i] * size
      if (position[i] < shape[i]) break
      from -= strides[i] * size * shape[i]
      position[i] = 0
    }
  }
  return ordered
}
