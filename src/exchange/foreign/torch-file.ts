import type { FileHandle } from 'node:fs/promises'
import { errorText } from '../../errors.js'
import { ELEMENT_BYTES } from '../array-layout.js'
import { isKind, type PickleValue, shown, type TensorValue } from '../torch/pickle-value.js'
import { unpickle } from '../torch/unpickle.js'
import { readZip, type ZipEntry } from '../zip-reader.js'
import { type FileTensor, ForeignError, type ForeignState, readNumber } from './file-tensor.js'

const MOST_PICKLE_BYTES = 2 ** 28

/**
 * The states in an optimizer's state dict that torch.save wrote, in the order of its param_groups. `key` leads to the
 * state dict in a larger one: words with dots in between. Nothing of the file is executed. Throws ForeignError.
 */
export async function readTorchFile(file: FileHandle, path: string, key?: string): Promise<ForeignState[]> {
  try {
    const entries = await readZip(file)
    const root = rootOf(entries)
    const { at, bytes } = entry(entries, `${root}data.pkl`)
    if (bytes > MOST_PICKLE_BYTES)
      throw new ForeignError(`data.pkl has ${bytes} bytes, expected at most ${MOST_PICKLE_BYTES}`)
    const { buffer } = await file.read(Buffer.alloc(bytes), 0, bytes, at)
    const archive = { file, root, entries }
    await checkByteOrder(archive)
    const found = lookUp(unpickle(buffer), key)
    return await Promise.all(statesOf(found, archive))
  } catch (error) {
    throw new ForeignError(`${path}: ${errorText(error)}`)
  }
}

type Archive = { file: FileHandle; root: string; entries: ReadonlyMap<string, ZipEntry> }
type Dict = Map<PickleValue, PickleValue>

/** The folder in the archive that has all entries: torch names it after the file. */
function rootOf(entries: ReadonlyMap<string, ZipEntry>): string {
  for (const name of entries.keys()) if (/^[^/]+\/data\.pkl$/.test(name)) return name.slice(0, -'data.pkl'.length)
  throw new ForeignError('it has no data.pkl, expected a file of torch.save')
}

function entry(entries: ReadonlyMap<string, ZipEntry>, name: string): ZipEntry {
  const found = entries.get(name)
  if (found) return found
  throw new ForeignError(`it has no entry '${name}'`)
}

async function checkByteOrder({ file, root, entries }: Archive): Promise<void> {
  const found = entries.get(`${root}byteorder`)
  if (found === undefined) return
  const { buffer } = await file.read(Buffer.alloc(Math.min(found.bytes, 16)), 0, Math.min(found.bytes, 16), found.at)
  if (buffer.toString() !== 'little') throw new ForeignError(`its byte order is '${buffer}', expected 'little'`)
}

function lookUp(value: PickleValue, key: string | undefined): { state: Dict; groups: PickleValue[] } {
  let found = value
  for (const word of key?.split('.') ?? []) {
    const next = found instanceof Map ? found.get(word) : undefined
    if (next === undefined) throw new ForeignError(`it has no '${key}', ${keysOf(found)}`)
    found = next
  }
  const [state, groups] = found instanceof Map ? [found.get('state'), found.get('param_groups')] : []
  if (state instanceof Map && Array.isArray(groups)) return { state, groups }
  throw new ForeignError(
    `it is no optimizer's state dict with state and param_groups, ${keysOf(found)} (--key leads to one)`,
  )
}

function keysOf(value: PickleValue): string {
  if (!(value instanceof Map)) return `it holds ${shown(value)}`
  return `there are ${[...value.keys()].slice(0, 10).map(shown).join(', ') || 'no keys'}`
}

function statesOf({ state, groups }: ReturnType<typeof lookUp>, archive: Archive): Promise<ForeignState>[] {
  const seen = new Set<PickleValue>()
  return groups.flatMap((group) => {
    const params = group instanceof Map ? group.get('params') : undefined
    if (!(group instanceof Map) || !Array.isArray(params))
      throw new ForeignError(`a param_group is ${shown(group)} without params`)
    const names = group.get('param_names')
    return params.map((param, i) => {
      if ((typeof param !== 'number' && typeof param !== 'string') || seen.has(param))
        throw new ForeignError(
          `a parameter of a param_group is ${shown(param)}, expected an index or a name of its own`,
        )
      seen.add(param)
      const given = Array.isArray(names) ? names[i] : param
      return stateOf(
        { key: String(param), name: typeof given === 'string' ? given : undefined },
        state.get(param),
        archive,
      )
    })
  })
}

/** A parameter's state: its tensors and its `step`. Values that are None or a flag are no state and are skipped. */
async function stateOf(
  of: Pick<ForeignState, 'key' | 'name'>,
  values: PickleValue | undefined,
  archive: Archive,
): Promise<ForeignState> {
  const tensors = new Map<string, FileTensor>()
  let count: number | undefined
  for (const [name, value] of values instanceof Map ? values : []) {
    const owner = `parameter '${of.name ?? of.key}'`
    if (typeof name !== 'string') throw new ForeignError(`state ${shown(name)} of ${owner} has no name that is a text`)
    const what = `'${name}' of ${owner}`
    const tensor = isKind(value, 'tensor') ? tensorIn(value, archive, what) : undefined
    if (name === 'step' && tensor) count = await readNumber(tensor, what)
    else if (name === 'step' && typeof value === 'number') count = value
    else if (tensor) tensors.set(name, tensor)
    else if (value !== null && typeof value !== 'boolean')
      throw new ForeignError(`state ${what} is ${shown(value)}, expected a tensor`)
  }
  return { ...of, tensors, count }
}

/** A tensor by its place in the file. Throws ForeignError where the tensor ends behind its storage. */
function tensorIn(
  { storage, offset, shape, strides }: TensorValue,
  { file, root, entries }: Archive,
  what: string,
): FileTensor {
  const { at, bytes } = entry(entries, `${root}data/${storage.key}`)
  // Types that no state has, such as uint8, are refused where the tensor is read.
  const size = ELEMENT_BYTES[storage.type] ?? 1
  const last = offset + shape.reduce((sum, extent, i) => sum + Math.max(0, extent - 1) * strides[i], 0)
  if (!shape.includes(0) && (last + 1) * size > bytes)
    throw new ForeignError(`${what} ends at byte ${(last + 1) * size} of its storage, which has ${bytes}`)
  return { file, dtype: storage.type, at: at + offset * size, shape, strides }
}
