import assert from 'node:assert'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { type SourceTensor, type StateGroup, type StateSource, stateName } from '../../store/checkpoint/state-source.js'
import { bytesOf } from '../../store/elements.js'
import type { SafetensorsDtype } from '../../store/safetensors.js'
import { DTYPE_NAMES } from '../array-layout.js'
import { type OutputFile, writeFiles, writeWhole } from '../output.js'
import { readCounts } from './counts.js'
import { countOf, emaElements } from './optimizer-file.js'
import { groupEntries } from './optimizers.js'
import { call, dict, float, global, int, list, object, type Picklable, pickle, tuple } from './pickle.js'
import { sizes, TorchFile, tensorNode } from './tensor.js'

// A folder of torch.distributed.checkpoint (DCP), version 1.0.0 of its format: `.metadata`, a pickle that lists the
// items and where they lie, and one data file, in which each item is an archive as torch.save writes it.

/**
 * An item: `bytes` bytes from byte `at` of the data file. `path` are its keys in the nested state dict. Only a tensor
 * has a shape.
 */
type Item = { path: readonly string[]; at: number; bytes: number; dtype?: SafetensorsDtype; shape?: readonly number[] }

const DATA_FILE = '__0_0.distcp'

/**
 * Writes a state as a folder for torch.distributed.checkpoint.load. The names are torch's flattened ones for the
 * state dict of an optimizer: `state.<parameter>.momentum_buffer`, `param_groups.<parameter>.lr`. Muon's buffers are
 * written as torch keeps them (`ema`). Returns the path. Throws OutputExistsError.
 */
export async function writeDcp(path: string, source: StateSource): Promise<string[]> {
  await writeWhole([path], async ([partial]) => {
    await mkdir(partial)
    const paths = [DATA_FILE, '.metadata'].map((name) => join(partial, name))
    await writeFiles(paths, async ([data, metadata]) => {
      const items = [...(await writeState(data, source)), ...(await writeGroups(data, source))]
      await metadata.write(pickle(metadataNode(items)))
    })
  })
  return [path]
}

async function writeState(data: OutputFile, source: StateSource): Promise<Item[]> {
  const { counts, rest } = await readCounts(source)
  const items: Item[] = []
  for (const parameter of source.description.parameters) {
    const { name } = parameter
    const bytes = bytesOf(Float32Array.of(countOf(parameter, counts)))
    const tensor = { name: stateName(name, 'step'), dtype: 'F32', shape: [], bytes: bytes.length } as const
    const next = await beginItem(data, { path: ['state', name, 'step'], tensor })
    await next.write(bytes)
    items.push(await next.end())
  }
  const groupOf = groupsOf(source)
  let open:
    | { tensor: SourceTensor; next: Awaited<ReturnType<typeof beginItem>>; take: (piece: Uint8Array) => Uint8Array }
    | undefined
  for await (const { tensor, piece } of rest) {
    if (open?.tensor !== tensor) {
      if (open) items.push(await open.next.end())
      const path = pathOf(tensor.name)
      const elements = emaElements(tensor, groupOf(path[1]))
      open = { tensor, next: await beginItem(data, { path, tensor }), take: (bytes) => bytesOf(elements.take(bytes)) }
    }
    await open.next.write(open.take(piece))
  }
  return open ? [...items, await open.next.end()] : items
}

/** The keys of a state tensor in the nested dict. The parameter's name may have dots, the tensor's has none. */
function pathOf(name: string): [string, string, string] {
  const dot = name.lastIndexOf('.')
  return ['state', name.slice('state.'.length, dot), name.slice(dot + 1)]
}

/** Finds the group of a parameter by the parameter's name. */
function groupsOf({ description: { groups, parameters } }: StateSource): (parameter: string) => StateGroup {
  const byName = new Map(groups.map((group) => [group.name, group]))
  const byParameter = new Map(parameters.map(({ name, group }) => [name, byName.get(group)]))
  return (name) => {
    const group = byParameter.get(name)
    assert(group, `parameter '${name}' is in a group`)
    return group
  }
}

async function writeGroups(data: OutputFile, source: StateSource): Promise<Item[]> {
  const items: Item[] = []
  const groupOf = groupsOf(source)
  for (const { name } of source.description.parameters) {
    for (const [key, value] of valuesOf(groupOf(name))) {
      const at = data.bytes
      const file = await TorchFile.begin((bytes) => data.write(bytes), value)
      await file.end()
      items.push({ path: ['param_groups', name, key], at, bytes: data.bytes - at })
    }
  }
  return items
}

/** A group's hyperparameters, those that torch has under torch's names and values. */
function valuesOf(group: StateGroup): Map<string, Picklable> {
  const { algorithm, hyperparameters } = group
  const own = Object.entries({ ...hyperparameters, algorithm }).map(([key, value]) => [key, valueNode(value)] as const)
  const torch = groupEntries(group).filter(([, value]) => value !== undefined)
  const form = 'momentum_form' in hyperparameters ? [['momentum_form', 'ema'] as const] : []
  return new Map<string, Picklable>([...own, ...torch, ...form])
}

function valueNode(value: unknown): Picklable {
  if (typeof value === 'number') return float(value)
  if (typeof value === 'boolean' || typeof value === 'string') return value
  assert(Array.isArray(value), `a hyperparameter is ${value}`)
  return tuple(...value.map(valueNode))
}

async function beginItem(data: OutputFile, { path, tensor }: { path: readonly string[]; tensor: SourceTensor }) {
  const at = data.bytes
  const file = await TorchFile.begin((bytes) => data.write(bytes), tensorNode(tensor, '0'))
  const storage = await file.storage('0', tensor.bytes)
  const end = async (): Promise<Item> => {
    await storage.end()
    await file.end()
    return { path, at, bytes: data.bytes - at, dtype: tensor.dtype, shape: tensor.shape }
  }
  return { write: storage.write, end }
}

const METADATA = 'torch.distributed.checkpoint.metadata'

/** The `Metadata` of all items. torch pickles its dataclasses by their fields. */
function metadataNode(items: readonly Item[]): Picklable {
  const stored = items.map((item): [Picklable, Picklable] => [indexNode(item), storageNode(item)])
  return object(
    global(METADATA, 'Metadata'),
    dict([
      ['state_dict_metadata', dict(items.map((item) => [nameOf(item), typeNode(item)]))],
      ['planner_data', dict(items.map((item) => [nameOf(item), tuple(...item.path)]))],
      ['storage_data', dict(stored)],
      ['storage_meta', null],
      ['version', '1.0.0'],
    ]),
  )
}

function nameOf({ path }: Item): string {
  return path.join('.')
}

function size(shape: readonly number[]): Picklable {
  return call(global('torch', 'Size'), sizes(shape))
}

function typeNode({ dtype, shape }: Item): Picklable {
  if (dtype === undefined || shape === undefined) return object(global(METADATA, 'BytesStorageMetadata'), dict([]))
  const properties = object(
    global(METADATA, 'TensorProperties'),
    tuple(
      global('torch', DTYPE_NAMES[dtype]),
      call(global('torch.serialization', '_get_layout'), 'torch.strided'),
      false,
      call(global(METADATA, '_MEM_FORMAT_ENCODING'), int(0)),
      false,
    ),
  )
  const origin = shape.map(() => 0)
  const chunk = object(
    global(METADATA, 'ChunkStorageMetadata'),
    dict([
      ['offsets', size(origin)],
      ['sizes', size(shape)],
    ]),
  )
  return object(
    global(METADATA, 'TensorStorageMetadata'),
    dict([
      ['properties', properties],
      ['size', size(shape)],
      ['chunks', list([chunk])],
    ]),
  )
}

function indexNode(item: Item): Picklable {
  const { shape } = item
  const entries: [Picklable, Picklable][] = [
    ['fqn', nameOf(item)],
    ['index', shape ? int(0) : null],
    ...(shape ? [['offset', size(shape.map(() => 0))] as [Picklable, Picklable]] : []),
  ]
  return object(global(METADATA, 'MetadataIndex'), dict(entries))
}

function storageNode({ at, bytes }: Item): Picklable {
  return object(
    global('torch.distributed.checkpoint.filesystem', '_StorageInfo'),
    dict([
      ['relative_path', DATA_FILE],
      ['offset', int(at)],
      ['length', int(bytes)],
    ]),
  )
}
