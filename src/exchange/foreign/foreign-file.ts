import { type FileHandle, open, readdir, readFile } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { MANIFEST } from '../../store/checkpoint/checkpoint-place.js'
import { openCheckpoint } from '../../store/checkpoint/checkpoint-source.js'
import { stateMetadata } from '../../store/checkpoint/state-source.js'
import { type FileTensor, ForeignError, type ForeignState } from './file-tensor.js'
import { fromOptaxNames, fromStateNames } from './names.js'
import { readNumpyFile } from './numpy-file.js'
import { readSafetensorsFile } from './safetensors-file.js'
import { readTorchFile } from './torch-file.js'

/** The optimizer that a file's state is from. */
export const ORIGINS = ['muond', 'torch-optimizer', 'moonlight', 'keller-jordan', 'optax'] as const
export type Origin = (typeof ORIGINS)[number]

/** The state in an open file. `momentum_form` is the file's metadata of that name, as `stateMetadata` writes it. */
export type ForeignFile = { states: ForeignState[]; momentum_form: string | undefined; close: () => Promise<void> }

/**
 * Opens a file with the state of an optimizer, which torch.save, numpy.savez or safetensors wrote: its ending tells.
 * `path` may also be an index of safetensors shards, a folder with one, or, for muond, a checkpoint's folder, whose
 * files must have their hashes. `key` leads to a state dict in a larger one: words with dots in between.
 * Throws ForeignError, UnreadableError.
 */
export async function openForeign(path: string, origin: Origin, key?: string): Promise<ForeignFile> {
  const files: FileHandle[] = []
  const close = async () => {
    for (const file of files) await file.close()
  }
  const opened = async (name: string) => {
    const file = await open(name, 'r').catch((error) => {
      throw new ForeignError(`${name} cannot be opened: ${error.message}`)
    })
    files.push(file)
    return file
  }
  try {
    return { ...(await read(path, { origin, key, opened })), close }
  } catch (error) {
    await close()
    throw error
  }
}

type Reading = { origin: Origin; key: string | undefined; opened: (name: string) => Promise<FileHandle> }

async function read(path: string, { origin, key, opened }: Reading): Promise<Omit<ForeignFile, 'close'>> {
  if (/\.(pt|pth|bin|ckpt)$/.test(path)) {
    if (origin === 'muond' || origin === 'optax') throw new ForeignError(`${path} is a file of torch, not of ${origin}`)
    const states = await readTorchFile(await opened(path), path, key)
    return { states: renamed(states, origin), momentum_form: undefined }
  }
  if (path.endsWith('.npz')) {
    if (origin !== 'optax') throw new ForeignError(`${path} is a file of numpy, expected for ${origin} is another one`)
    return { states: await fromOptaxNames(await readNumpyFile(await opened(path), path)), momentum_form: undefined }
  }
  const { tensors, momentum_form } = await readShards(path, opened)
  const states = origin === 'optax' ? await fromOptaxNames(tensors) : renamed(await fromStateNames(tensors), origin)
  return { states, momentum_form: origin === 'muond' ? momentum_form : undefined }
}

/** State tensors that an origin has under other names than torch: Moonlight's AdamW. */
const RENAMED: Readonly<Partial<Record<Origin, Readonly<Record<string, string>>>>> = {
  moonlight: { moment1: 'exp_avg', moment2: 'exp_avg_sq' },
}

function renamed(states: readonly ForeignState[], origin: Origin): ForeignState[] {
  const names = RENAMED[origin] ?? {}
  return states.map((state) => ({
    ...state,
    tensors: new Map([...state.tensors].map(([name, tensor]) => [names[name] ?? name, tensor])),
  }))
}

async function readShards(
  path: string,
  opened: Reading['opened'],
): Promise<{ tensors: Map<string, FileTensor>; momentum_form: string | undefined }> {
  const { paths, momentum_form } = await shardsOf(path)
  const all = new Map<string, FileTensor>()
  const said: (string | undefined)[] = [momentum_form]
  for (const shard of paths) {
    const { tensors, metadata } = await readSafetensorsFile(await opened(shard), shard)
    said.push(metadata.momentum_form)
    for (const [name, tensor] of tensors) {
      if (all.has(name)) throw new ForeignError(`${shard} has tensor '${name}', as another file has`)
      all.set(name, tensor)
    }
  }
  return { tensors: all, momentum_form: said.find((form) => form !== undefined) }
}

async function shardsOf(path: string): Promise<{ paths: string[]; momentum_form?: string }> {
  if (path.endsWith('.safetensors')) return { paths: [path] }
  if (path.endsWith('.index.json')) return { paths: await indexed(path) }
  const names = await readdir(path).catch((error) => {
    throw new ForeignError(`${path} is no folder, and its ending is that of no known file: ${error.message}`)
  })
  if (!names.includes(MANIFEST)) {
    const [index, ...more] = names.filter((name) => name.endsWith('.safetensors.index.json'))
    if (index === undefined || more.length > 0)
      throw new ForeignError(`${path} is a folder with neither a manifest nor one index`)
    return { paths: await indexed(join(path, index)) }
  }
  const source = await openCheckpoint(path)
  try {
    for await (const _ of source.read());
  } finally {
    await source.close()
  }
  const shards = names.filter((name) => name.endsWith('.safetensors')).sort()
  return {
    paths: shards.map((name) => join(path, name)),
    momentum_form: stateMetadata(source.description).momentum_form,
  }
}

async function indexed(path: string): Promise<string[]> {
  const text = await readFile(path, 'utf8').catch((error) => {
    throw new ForeignError(`${path} cannot be read: ${error.message}`)
  })
  const { weight_map }: { weight_map?: unknown } = parseJson(text, path)
  if (typeof weight_map !== 'object' || weight_map === null) throw new ForeignError(`${path} has no weight_map`)
  const names = [...new Set(Object.values(weight_map))].map((name) => {
    if (typeof name === 'string' && basename(name) === name) return name
    throw new ForeignError(`${path} names the file ${JSON.stringify(name)}, expected one beside it`)
  })
  return names.sort().map((name) => join(dirname(path), name))
}

function parseJson(text: string, path: string): { weight_map?: unknown } {
  try {
    return Object(JSON.parse(text))
  } catch (error) {
    throw new ForeignError(`${path} is no JSON: ${error}`)
  }
}
