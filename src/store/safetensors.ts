import { type OpenFile, readBytes } from './file-bytes.js'

// The safetensors format (https://huggingface.co/docs/safetensors): the header's length as a little-endian u64, a JSON
// header {name: {dtype, shape, data_offsets}, __metadata__: {…}}, then the tensors' bytes without holes.

/** The bytes of an element of each dtype. */
export const SAFETENSORS_DTYPES = { F32: 4, BF16: 2, F16: 2, I64: 8, I32: 4 } as const

/** The name in safetensors of each dtype that a state tensor may have. */
export const SAFETENSORS_NAMES = { float32: 'F32', bfloat16: 'BF16' } as const

export type SafetensorsDtype = keyof typeof SAFETENSORS_DTYPES

/** One tensor of a file to be written: `bytes` is its size, equal to the elements of `shape` times the dtype's size. */
export type TensorEntry = { name: string; dtype: SafetensorsDtype; shape: readonly number[]; bytes: number }

/** `data` is a view into the parsed buffer: little-endian, C order, not necessarily aligned to its element. */
export type StoredTensor = { dtype: SafetensorsDtype; shape: number[]; data: Uint8Array }

/** Where a tensor's bytes lie in its file. */
export type TensorRange = { name: string; dtype: SafetensorsDtype; shape: number[]; begin: number; end: number }

/** The part of a file before the tensors' bytes, read; the ranges are in the order of the file. */
export type Header = { metadata: Record<string, string>; ranges: TensorRange[] }

export type Safetensors = { metadata: Record<string, string>; tensors: Map<string, StoredTensor> }

/** The bytes are not a safetensors file that this service writes; the message says what is wrong and where. */
export class SafetensorsError extends Error {
  override readonly name = 'SafetensorsError'
}

/** The bytes of the number that a file begins with: its header's length. */
export const LENGTH_BYTES = 8
/** So many tensors' entries are written in about two milliseconds. */
const ENTRIES_PER_YIELD = 512
// The limit of the reference implementation: a corrupt length is refused before so much memory is asked for.
const MAX_HEADER_BYTES = 100_000_000
const METADATA = '__metadata__'

/**
 * The part of a file before the tensors' bytes, which have to follow in the order given. Its length is a multiple of 8,
 * so every tensor is aligned where those of 8-byte elements come first. Throws SafetensorsError for a name that appears
 * twice and for a size that does not fit its shape.
 */
export function encodeHeader(
  tensors: readonly TensorEntry[],
  metadata: Readonly<Record<string, string>> = {},
): Uint8Array {
  const encoding = encodingHeader(tensors, metadata)
  for (;;) {
    const { done, value } = encoding.next()
    if (done) return value
  }
}

/** The same header as `encodeHeader`. Yields from time to time. */
export function* encodingHeader(
  tensors: Iterable<TensorEntry>,
  metadata: Readonly<Record<string, string>> = {},
): Generator<undefined, Uint8Array> {
  const parts: Buffer[] = []
  let entries = Object.keys(metadata).length > 0 ? [`"${METADATA}":${JSON.stringify(metadata)}`] : []
  const names = new Set([METADATA])
  let offset = 0
  for (const { name, dtype, shape, bytes } of tensors) {
    if (names.has(name)) throw new SafetensorsError(`tensor name '${name}' is reserved or appears twice`)
    names.add(name)
    expectSize({ dtype, shape, bytes }, `tensor '${name}'`)
    // As text, because an object would put names that are numbers first, and a tensor may be called __proto__.
    const end = offset + bytes
    entries.push(`${JSON.stringify(name)}:{"dtype":"${dtype}","shape":[${shape}],"data_offsets":[${offset},${end}]}`)
    offset = end
    if (entries.length < ENTRIES_PER_YIELD) continue
    parts.push(Buffer.from(entries.join(',')))
    entries = []
    yield
  }
  if (entries.length > 0) parts.push(Buffer.from(entries.join(',')))
  return framed(parts)
}

/** A header of the parts of its JSON: its length, the parts with commas between, and spaces up to a multiple of 8. */
function framed(parts: readonly Buffer[]): Uint8Array {
  const [comma, length] = [Buffer.from(','), Buffer.alloc(LENGTH_BYTES)]
  const separated = parts.flatMap((part, i) => (i === 0 ? [part] : [comma, part]))
  const used = separated.reduce((sum, part) => sum + part.length, '{}'.length)
  const padding = Buffer.alloc(Math.ceil(used / 8) * 8 - used, ' ')
  length.writeBigUInt64LE(BigInt(used + padding.length))
  return Buffer.concat([length, Buffer.from('{'), ...separated, Buffer.from('}'), padding])
}

/** Reads a whole file. Throws SafetensorsError unless every byte is accounted for by exactly one tensor. */
export function parseSafetensors(buffer: Uint8Array): Safetensors {
  const end = headerEnd(buffer.subarray(0, LENGTH_BYTES), buffer.length)
  const { metadata, ranges } = parseHeader(buffer.subarray(LENGTH_BYTES, end), { start: end, bytes: buffer.length })
  const tensors = ranges.map(({ name, dtype, shape, begin, end }) => {
    return [name, { dtype, shape, data: buffer.subarray(begin, end) }] as const
  })
  return { metadata, tensors: new Map(tensors) }
}

/** Reads the header of an open file: where each tensor lies. Throws SafetensorsError as `parseSafetensors`. */
export async function readHeader(file: OpenFile): Promise<Header> {
  const { size } = await file.stat()
  const end = headerEnd(await readBytes(file, 0, LENGTH_BYTES), size)
  return parseHeader(await readBytes(file, LENGTH_BYTES, end - LENGTH_BYTES), { start: end, bytes: size })
}

/**
 * The byte at which the tensors begin in a file of `bytes` bytes that starts with `prefix`. Throws SafetensorsError
 * where the header does not fit into the file, or has more than `most` bytes.
 */
export function headerEnd(prefix: Uint8Array, bytes: number, most = MAX_HEADER_BYTES): number {
  if (prefix.length < LENGTH_BYTES) fail(`file has ${prefix.length} bytes, expected at least ${LENGTH_BYTES}`)
  const length = Number(new DataView(prefix.buffer, prefix.byteOffset, prefix.byteLength).getBigUint64(0, true))
  const available = Math.min(bytes - LENGTH_BYTES, most)
  if (length > available) fail(`header claims ${length} bytes, at most ${available} are possible`)
  return LENGTH_BYTES + length
}

/** Reads the JSON of a header. The tensors begin at byte `start`; the file has `bytes` bytes, where that is known. */
export function parseHeader(json: Uint8Array, body: { start: number; bytes?: number }): Header {
  const { [METADATA]: metadata = {}, ...rest } = parseJson(json)
  const ranges = Object.entries(rest).map(([name, entry]) => {
    const { dtype, shape, begin, end } = parseEntry(entry, `tensor '${name}'`)
    return { name, dtype, shape, begin: body.start + begin, end: body.start + end }
  })
  ranges.sort((a, b) => a.begin - b.begin || a.end - b.end)
  expectCover(ranges, body)
  return { metadata: parseMetadata(metadata), ranges }
}

function parseJson(bytes: Uint8Array): Record<string, unknown> {
  let header: unknown
  try {
    header = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  } catch (error) {
    throw new SafetensorsError(`header is not JSON: ${error}`, { cause: error })
  }
  return isRecord(header) ? header : fail('header is not a JSON object')
}

function parseMetadata(metadata: unknown): Record<string, string> {
  if (!isRecord(metadata)) return fail(`${METADATA} is not an object`)
  const pairs = Object.entries(metadata).map(([key, value]): [string, string] => [
    key,
    typeof value === 'string' ? value : fail(`${METADATA} '${key}' is ${JSON.stringify(value)}, expected a string`),
  ])
  return Object.fromEntries(pairs)
}

function parseEntry(entry: unknown, name: string) {
  if (!isRecord(entry)) return fail(`${name} is not an object`)
  const { dtype, shape, data_offsets: offsets } = entry
  if (!isDtype(dtype)) return fail(`${name} has dtype ${JSON.stringify(dtype)}, expected one of ${KNOWN_DTYPES}`)
  if (!isSizes(shape)) return fail(`${name} has shape ${JSON.stringify(shape)}, expected a list of sizes`)
  if (!isSizes(offsets) || offsets.length !== 2) {
    return fail(`${name} has data_offsets ${JSON.stringify(offsets)}, expected two offsets`)
  }
  const [begin, end] = offsets
  expectSize({ dtype, shape, bytes: end - begin }, name)
  return { dtype, shape, begin, end }
}

const KNOWN_DTYPES = Object.keys(SAFETENSORS_DTYPES).join(', ')

function expectSize(tensor: Omit<TensorEntry, 'name'>, name: string): void {
  const expected = tensor.shape.reduce((product, size) => product * size, SAFETENSORS_DTYPES[tensor.dtype])
  if (tensor.bytes === expected) return
  fail(`${name} has ${tensor.bytes} bytes, ${tensor.dtype} of shape [${tensor.shape}] has ${expected}`)
}

/** The ranges, in order, must tile the body: no hole, no overlap, nothing behind the last one. */
function expectCover(ranges: readonly TensorRange[], { start, bytes }: { start: number; bytes?: number }): void {
  let covered = start
  for (const { begin, end } of ranges) {
    if (begin !== covered) fail(`a tensor begins at byte ${begin - start}, expected ${covered - start}`)
    covered = end
  }
  if (bytes !== undefined && covered !== bytes)
    fail(`tensors end at byte ${covered - start}, the data has ${bytes - start} bytes`)
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isDtype(value: unknown): value is SafetensorsDtype {
  return typeof value === 'string' && Object.hasOwn(SAFETENSORS_DTYPES, value)
}

function isSizes(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((size) => Number.isSafeInteger(size) && size >= 0)
}

function fail(message: string): never {
  throw new SafetensorsError(message)
}
