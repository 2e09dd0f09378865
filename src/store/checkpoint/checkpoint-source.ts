import { createHash } from 'node:crypto'
import { type FileHandle, open, readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { errorText } from '../../errors.js'
import { checkpointNames, MANIFEST } from '../run-folder.js'
import { type Header, readHeader } from '../safetensors.js'
import { type FileRecord, type Manifest, openManifest, UnreadableError } from './manifest.js'
import { type SourceTensor, type StateSource, stateName } from './state-source.js'

const PIECE_BYTES = 4 << 20
const COUNT_BYTES = 8

type Shard = { path: string; record: FileRecord; file: FileHandle; header: Header }

/**
 * The state of a checkpoint's folder. Checkpoints do not change, so a service may be at work beside it. Every file is held
 * against its hash as it is read. Throws UnreadableError.
 */
export async function openCheckpoint(folder: string): Promise<StateSource> {
  const manifest = await readManifest(folder)
  const shards: Shard[] = []
  const close = async () => {
    for (const { file } of shards) await file.close()
  }
  try {
    for (const record of manifest.files.filter(({ name }) => name.endsWith('.safetensors')))
      shards.push(await openShard(join(folder, record.name), record))
  } catch (error) {
    await close()
    throw error
  }
  const stored = shards.flatMap(({ header }) =>
    header.ranges.map(({ begin, end, ...range }): SourceTensor => ({ ...range, bytes: end - begin })),
  )
  // A checkpoint says nothing of a parameter without state.
  const known = new Set(stored.map(({ name }) => name))
  const counts = manifest.parameters.map(({ name }) => stateName(name, 'step')).filter((name) => !known.has(name))
  const zeros = counts.map((name): SourceTensor => ({ name, dtype: 'I64', shape: [], bytes: COUNT_BYTES }))
  const read = async function* () {
    for (const tensor of zeros.keys()) yield { tensor, piece: new Uint8Array(COUNT_BYTES) }
    for await (const { tensor, piece } of readShards(shards)) yield { tensor: tensor + zeros.length, piece }
  }
  return { description: manifest, tensors: [...zeros, ...stored], read, close }
}

/** The folder of a run's checkpoint by its id or a tag, or of the newest one. Throws UnreadableError that says which there are. */
export async function findCheckpoint(data: string, run: string, checkpoint?: string): Promise<string> {
  const folder = join(data, 'runs', run, 'checkpoints')
  const names = checkpointNames(
    await readdir(folder).catch((error) => {
      throw new UnreadableError(`data folder '${data}' has no run '${run}': ${error.message}`)
    }),
  )
  const whole: string[] = []
  for (const name of names) if ((await readdir(join(folder, name))).includes(MANIFEST)) whole.push(name)
  const newest = whole.at(-1)
  const found = checkpoint === undefined ? newest : await byIdOrTag(folder, whole, checkpoint)
  if (found !== undefined) return join(folder, found)
  const known = whole.join(', ') || 'none'
  throw new UnreadableError(
    `run '${run}' has no checkpoint ${checkpoint ? `'${checkpoint}'` : 'yet'}, there are ${known}`,
  )
}

async function byIdOrTag(folder: string, names: readonly string[], wanted: string): Promise<string | undefined> {
  if (names.includes(wanted)) return wanted
  // The newest that has the tag.
  for (const name of [...names].reverse()) {
    const { tags } = await readManifest(join(folder, name))
    if (tags.includes(wanted)) return name
  }
  return undefined
}

async function readManifest(folder: string): Promise<Manifest> {
  const path = join(folder, MANIFEST)
  const text = await readFile(path, 'utf8').catch((error) => {
    throw new UnreadableError(`${path} cannot be read: ${error.message}`)
  })
  return openManifest(text, path)
}

async function openShard(path: string, record: FileRecord): Promise<Shard> {
  const file = await open(path, 'r').catch((error) => {
    throw new UnreadableError(`${path} cannot be opened: ${error.message}`)
  })
  try {
    return { path, record, file, header: await readHeader(file) }
  } catch (error) {
    await file.close()
    throw new UnreadableError(`${path}: ${errorText(error)}`)
  }
}

async function* readShards(shards: readonly Shard[]): AsyncGenerator<{ tensor: number; piece: Uint8Array }> {
  let tensor = 0
  for (const { path, record, file, header } of shards) {
    const hash = createHash('sha256')
    for (const { begin } of header.ranges.slice(0, 1)) {
      for await (const piece of readRange(file, 0, begin)) hash.update(piece)
    }
    for (const { begin, end } of header.ranges) {
      for await (const piece of readRange(file, begin, end)) {
        hash.update(piece)
        yield { tensor, piece }
      }
      tensor += 1
    }
    const actual = hash.digest('hex')
    if (actual !== record.sha256) throw new UnreadableError(`${path} has SHA-256 ${actual}, expected ${record.sha256}`)
  }
}

/** The bytes of a file from `begin` to `end`, each piece in memory of its own; fewer where the file ends before. */
export async function* readRange(file: FileHandle, begin: number, end: number): AsyncGenerator<Uint8Array> {
  for (let at = begin; at < end; ) {
    const length = Math.min(PIECE_BYTES, end - at)
    const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, at)
    if (bytesRead === 0) return
    yield buffer.subarray(0, bytesRead)
    at += bytesRead
  }
}
