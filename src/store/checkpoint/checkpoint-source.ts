import { createHash } from 'node:crypto'
import { access, type FileHandle, open } from 'node:fs/promises'
import { join } from 'node:path'
import { S3_SCHEME } from '../../contradictions.js'
import { errorText } from '../../errors.js'
import { branchFolder } from '../branches.js'
import { readRange } from '../file-bytes.js'
import { readIdentity } from '../folder/run-folder.js'
import { type Header, readHeader } from '../safetensors.js'
import { CheckpointList, readCheckpoints, readManifest } from './checkpoint-list.js'
import { MANIFEST } from './checkpoint-place.js'
import { type FileRecord, type Manifest, UnreadableError } from './manifest.js'
import { type SourceTensor, type StateSource, stateName } from './state-source.js'

const COUNT_BYTES = 8

/** A safetensors file of a checkpoint, open; `record` has the hash that the file must have. */
type OpenShard = { path: string; record: FileRecord; file: FileHandle; header: Header }

/**
 * Opens the state in a checkpoint's folder. A checkpoint does not change, so a service may go on using its data folder
 * meanwhile. `read` compares every file with its hash. Throws UnreadableError.
 */
export async function openCheckpoint(folder: string): Promise<StateSource> {
  const manifest = await manifestIn(folder)
  const shards: OpenShard[] = []
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
  // A checkpoint has no tensor of a parameter that no update was applied to: its count is 0.
  const known = new Set(stored.map(({ name }) => name))
  const counts = manifest.parameters.map(({ name }) => stateName(name, 'step')).filter((name) => !known.has(name))
  const zeros = counts.map((name): SourceTensor => ({ name, dtype: 'I64', shape: [], bytes: COUNT_BYTES }))
  const read = async function* () {
    for (const tensor of zeros.keys()) yield { tensor, piece: new Uint8Array(COUNT_BYTES) }
    for await (const { tensor, piece } of readShards(shards)) yield { tensor: tensor + zeros.length, piece }
  }
  return { description: manifest, tensors: [...zeros, ...stored], read, close }
}

/**
 * The folder of a run's checkpoint by its id or a tag, or of the one that the run goes on from where `checkpoint` is
 * not given. Throws UnreadableError, which names the checkpoints that there are.
 */
export async function findCheckpoint(data: string, run: string, checkpoint?: string): Promise<string> {
  refuseObjects(data)
  const folder = join(data, 'runs', run)
  await access(folder).catch((error) => {
    throw new UnreadableError(`data folder '${data}' has no run '${run}': ${error.message}`)
  })
  const entries = await readCheckpoints(folder, { tidy: false })
  const list = new CheckpointList(entries, await readIdentity(folder, entries.length === 0))
  const found = checkpoint === undefined ? list.newest : list.find(checkpoint)
  if (found?.problem !== undefined) throw new UnreadableError(found.problem)
  if (found) return join(branchFolder(folder, found.branch), 'checkpoints', found.checkpoint)
  const known = entries.map((entry) => entry.checkpoint).join(', ') || 'none'
  throw new UnreadableError(
    `run '${run}' has no checkpoint ${checkpoint ? `'${checkpoint}'` : 'yet'}, there are ${known}`,
  )
}

/** Throws UnreadableError where runs are not in a folder: what reads them beside a service reads files. */
export function refuseObjects(data: string): void {
  if (!data.startsWith(S3_SCHEME)) return
  throw new UnreadableError(`'${data}' is no folder: ask the service that has it, over REST`)
}

async function manifestIn(folder: string): Promise<Manifest> {
  return readManifest(folder).catch((error) => {
    /* c8 ignore next 3 -- a manifest that was there may go while it is read */
    throw error instanceof UnreadableError
      ? error
      : new UnreadableError(`${join(folder, MANIFEST)} cannot be read: ${errorText(error)}`)
  })
}

async function openShard(path: string, record: FileRecord): Promise<OpenShard> {
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

async function* readShards(shards: readonly OpenShard[]): AsyncGenerator<{ tensor: number; piece: Uint8Array }> {
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
