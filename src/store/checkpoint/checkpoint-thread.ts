import { createHash, type Hash } from 'node:crypto'
import { readlinkSync } from 'node:fs'
import { setPriority } from 'node:os'
import { basename } from 'node:path'
import { parentPort } from 'node:worker_threads'
import { openStateAccess, type StateAccess, type StateLocation } from '../../device/state-access.js'
import { errorText } from '../../errors.js'
import type { StoreSample } from '../../metrics.js'
import type { OpenFile } from '../file-bytes.js'
import { checkpointObjects, NoObjectError } from '../objects/checkpoint-objects.js'
import { type Objects, StoreError } from '../objects/objects.js'
import { openObjects } from '../objects/open-objects.js'
import { type Header, readHeader } from '../safetensors.js'
import { checkpointFolder } from './checkpoint-folder.js'
import type { CheckpointAddress, CheckpointPlace, FileSink } from './checkpoint-place.js'
import { forPeople, groupsText } from './checkpoint-texts.js'
import {
  type FileRecord,
  type Manifest,
  type ParameterRecord,
  type PlaceRecord,
  sealManifest,
  UnreadableError,
} from './manifest.js'
import { entryBytes, indexText, planShards, type StateEntry, type TensorLocation } from './state-files.js'

// This file is a worker thread: hashing and waiting for the disk take nothing from the event loop.

/** The lists of a checkpoint, which are as long as the model has parameters or more. */
type Lists = { parameters: readonly ParameterRecord[]; places: readonly PlaceRecord[]; entries: readonly StateEntry[] }

/**
 * Asks for a checkpoint to be written; the thread makes the files and adds them, with their hashes, to
 * `manifest`. A safetensors file has at most `file_bytes` of tensors, unless one tensor alone has more.
 */
export type WriteRequest = {
  type: 'write'
  id: number
  address: CheckpointAddress
  locations: readonly StateLocation[]
  manifest: Omit<Manifest, 'files' | 'bytes' | 'momentum_form' | 'dtypes' | keyof Lists>
  file_bytes: number
}

/** Comes before a request to write, any number of times: what its lists go on with. */
export type ListsRequest = { type: 'lists'; id: number } & Lists

/** Asks for a checkpoint's tensors to be read into the memory of `targets`, by name; every file must have its hash. */
export type ReadRequest = {
  type: 'read'
  id: number
  address: CheckpointAddress
  locations: readonly StateLocation[]
  files: readonly FileRecord[]
  targets: ReadonlyMap<string, TensorLocation & { dtype: string; shape: readonly number[] }>
}

/** A manifest without its long lists: those stay in the thread. */
export type WrittenManifest = Omit<Manifest, keyof Lists | 'dtypes' | 'files'>

export type ThreadRequest = ListsRequest | WriteRequest | ReadRequest | { type: 'stop' }

/** `written` is how many entries, counted over all files, have memory that is not read any more. */
export type ThreadReply =
  | { id: number; written: number }
  | { id: number; done: WrittenManifest | undefined }
  | { id: number; error: string; kind: ErrorKind }
  | { sample: StoreSample }

/** Whether files are not what was written, a store has failed, or something else. */
export type ErrorKind = 'unreadable' | 'store' | 'other'

const PIECE_BYTES = 4 << 20
// A write takes as long as to hash tens of kilobytes, however few bytes it has: those of small tensors go together.
const GATHERED_BYTES = 1 << 20

// The steps that are computed meanwhile have the processor first. Only Linux has a priority for each thread.
const NICE = 10
if (process.platform === 'linux') setPriority(Number(basename(readlinkSync('/proc/thread-self'))), NICE)

const accesses = new Map<string, StateAccess>()
const stores = new Map<string, Promise<Objects>>()
let turn: Promise<void> = Promise.resolve()

/** Of requests that have not come to their end. */
const lists = new Map<number, { [Key in keyof Lists]: Lists[Key][number][] }>()

parentPort?.on('message', (request: ThreadRequest) => {
  if (request.type === 'lists') return collect(request)
  turn = turn.then(() => handle(request))
})

function collect({ id, parameters, places, entries }: ListsRequest): void {
  const all = lists.get(id) ?? { parameters: [], places: [], entries: [] }
  all.parameters.push(...parameters)
  all.places.push(...places)
  all.entries.push(...entries)
  lists.set(id, all)
}

async function handle(request: Exclude<ThreadRequest, ListsRequest>): Promise<void> {
  if (request.type === 'stop') {
    for (const access of accesses.values()) access.close()
    parentPort?.close()
    return
  }
  const { id } = request
  try {
    reply({ id, done: request.type === 'write' ? await write(request) : await read(request) })
  } catch (error) {
    reply({ id, error: errorText(error), kind: kindOf(error) })
  } finally {
    lists.delete(id)
  }
}

function reply(message: ThreadReply): void {
  parentPort?.postMessage(message)
}

function kindOf(error: unknown): ErrorKind {
  if (error instanceof UnreadableError) return 'unreadable'
  return error instanceof StoreError ? 'store' : 'other'
}

async function placeOf(address: CheckpointAddress): Promise<CheckpointPlace> {
  if (address.kind === 'folder') return checkpointFolder(address.folder)
  const key = JSON.stringify(address.objects)
  const opened = stores.get(key) ?? openObjects(address.objects, (sample) => reply({ sample }))
  stores.set(key, opened)
  return checkpointObjects(await opened, address.folder)
}

function accessTo(location: StateLocation): StateAccess {
  const key = JSON.stringify(location)
  const access = accesses.get(key) ?? openStateAccess(location)
  accesses.set(key, access)
  return access
}

async function write(request: WriteRequest): Promise<WrittenManifest> {
  const place = await placeOf(request.address)
  await place.begin()
  try {
    return await fill(place, request)
  } catch (error) {
    // On a full disk the next checkpoint needs the room. What cannot be removed is removed at the next start.
    await Promise.allSettled([place.discard()])
    throw error
  }
}

async function fill(
  place: CheckpointPlace,
  { id, locations, file_bytes, manifest }: WriteRequest,
): Promise<WrittenManifest> {
  /* c8 ignore next -- the lists of a checkpoint come before it, if it has any */
  const { parameters, places, entries: all } = lists.get(id) ?? { parameters: [], places: [], entries: [] }
  const files = planShards(all, file_bytes)
  const texts = [
    { name: 'state.safetensors.index.json', text: indexText(files) },
    { name: 'param_groups.json', text: groupsText({ parameters, groups: manifest.groups }) },
  ]
  const records: FileRecord[] = []
  let before = 0
  for (const { name, header, entries } of files) {
    const bytes = entries.reduce((sum, entry) => sum + entryBytes(entry), header.length)
    const record = await writeWhole(await place.create(name, bytes), async (file) => {
      await file.write(header)
      await writeEntries(file, { entries, locations }, (written) => reply({ id, written: before + written }))
    })
    before += entries.length
    records.push({ name, ...record })
  }
  for (const { name, text } of texts) {
    const content = Buffer.from(text)
    const record = await writeWhole(await place.create(name, content.length), (file) => file.write(content))
    records.push({ name, ...record })
  }
  const bytes = records.reduce((sum, record) => sum + record.bytes, 0)
  const { dtypes, momentum_form } = forPeople(manifest, all)
  const written = { ...manifest, momentum_form, bytes }
  await place.finish(sealManifest({ ...written, dtypes, parameters, places, files: records }))
  return written
}

/** Writes the bytes of entries, small ones together. `done` is told how many were written so far. */
async function writeEntries(
  file: Output,
  { entries, locations }: { entries: readonly StateEntry[]; locations: readonly StateLocation[] },
  done: (written: number) => void,
): Promise<void> {
  const gathered = Buffer.allocUnsafeSlow(GATHERED_BYTES)
  let filled = 0
  for (const [position, entry] of entries.entries()) {
    const bytes = entryBytes(entry)
    if (filled > 0 && filled + bytes > GATHERED_BYTES) {
      await file.write(gathered.subarray(0, filled))
      filled = 0
      done(position)
    }
    if (bytes > GATHERED_BYTES) {
      await writeLarge(file, entry, locations)
      done(position + 1)
    } else {
      const source = 'inline' in entry ? entry.inline : readFrom(entry.placed, locations)
      gathered.set(source, filled)
      filled += bytes
    }
  }
  await file.write(gathered.subarray(0, filled))
  done(entries.length)
}

function readFrom({ unit, pointer, bytes }: TensorLocation, locations: readonly StateLocation[]): Uint8Array {
  return accessTo(locations[unit]).read(pointer, bytes)
}

async function writeLarge(file: Output, entry: StateEntry, locations: readonly StateLocation[]): Promise<void> {
  if ('inline' in entry) return file.write(entry.inline)
  const { unit, pointer, bytes: all } = entry.placed
  for (let offset = 0; offset < all; offset += PIECE_BYTES) {
    const bytes = Math.min(PIECE_BYTES, all - offset)
    await file.write(readFrom({ unit, pointer: pointer + BigInt(offset), bytes }, locations))
  }
}

/** Has `work` write a file's bytes; answers how many there are, and their hash, once the file survives a crash. */
async function writeWhole(sink: FileSink, work: (file: Output) => Promise<void>): Promise<Omit<FileRecord, 'name'>> {
  try {
    const file = new Output(sink)
    await work(file)
    await sink.end()
    return file.record()
  } finally {
    await sink.close()
  }
}

/** A file that is being written from front to back, and the hash of its bytes so far. */
class Output {
  readonly #sink: FileSink
  readonly #hash: Hash = createHash('sha256')
  #bytes = 0

  constructor(sink: FileSink) {
    this.#sink = sink
  }

  /** Writes and hashes at the same time: neither waits for the other. */
  async write(bytes: Uint8Array): Promise<void> {
    const written = this.#sink.write(bytes)
    this.#hash.update(bytes)
    await written
    this.#bytes += bytes.length
  }

  record(): Omit<FileRecord, 'name'> {
    return { bytes: this.#bytes, sha256: this.#hash.digest('hex') }
  }
}

async function read({ address, locations, files, targets }: ReadRequest): Promise<undefined> {
  const place = await placeOf(address)
  const left = new Set(targets.keys())
  for (const record of files) {
    const input = { path: `${place.name}/${record.name}`, file: await openToRead(place, record.name) }
    try {
      const ranges = record.name.endsWith('.safetensors') ? await rangesOf(input, { record, targets, left }) : []
      await readThrough(input, record, destinationOf(ranges, locations))
    } finally {
      await input.file.close()
    }
  }
  const [missing] = left
  if (missing !== undefined) throw new UnreadableError(`${place.name} has no tensor '${missing}'`)
}

/** A file that is open, and its name in messages. */
type Input = { path: string; file: OpenFile }

/** The bytes of a file, from `begin` to `end`, that are a tensor's, and the memory that they are read into. */
type Range = { begin: number; end: number; target: TensorLocation }

type Wanted = { record: FileRecord; targets: ReadRequest['targets']; left: Set<string> }

/**
 * Where each target lies in a file; `left` loses the names that are found. A header that cannot be right is told by the
 * file's wrong hash first: the file is damaged.
 */
async function rangesOf(input: Input, { record, targets, left }: Wanted): Promise<Range[]> {
  const { path } = input
  try {
    const { ranges } = await headerOf(input)
    return ranges.flatMap(({ name, dtype, shape, begin, end }) => {
      const target = targets.get(name)
      if (target === undefined) return []
      const [has, expected] = [`${dtype} [${shape}]`, `${target.dtype} [${target.shape}]`]
      if (has !== expected) throw new UnreadableError(`${path}: tensor '${name}' is ${has}, expected ${expected}`)
      left.delete(name)
      return [{ begin, end, target }]
    })
  } catch (error) {
    if (!(error instanceof StoreError)) await readThrough(input, record, destinationOf([], []))
    throw error
  }
}

async function headerOf({ path, file }: Input): Promise<Header> {
  return readHeader(file).catch((error) => {
    throw error instanceof StoreError ? error : new UnreadableError(`${path}: ${errorText(error)}`)
  })
}

/** Where the bytes of a file are read into, from the first to the last. */
type Destination = {
  /** The memory for the bytes from `at` on, or, where they are read into a buffer, how many may be read at most. */
  room(at: number): Uint8Array | number
  /** Copies a buffer's bytes, which are the file's from `at` on, into the tensors that they belong to. */
  place(at: number, piece: Uint8Array): void
}

/**
 * A tensor of so many bytes is read into its memory without a buffer: touching fresh pages costs as much as hashing.
 */
const STRAIGHT_BYTES = 1 << 20

function destinationOf(ranges: readonly Range[], locations: readonly StateLocation[]): Destination {
  const straight: (Range & { view: NonNullable<StateAccess['view']> })[] = []
  const copied: Range[] = []
  for (const range of ranges) {
    const { view } = accessTo(locations[range.target.unit])
    if (view && range.end - range.begin >= STRAIGHT_BYTES) straight.push({ ...range, view })
    else copied.push(range)
  }
  return {
    room: (at) => {
      while (straight.length > 0 && straight[0].end <= at) straight.shift()
      if (straight.length === 0) return PIECE_BYTES
      const { begin, end, target, view } = straight[0]
      if (at < begin) return Math.min(PIECE_BYTES, begin - at)
      return view(target.pointer + BigInt(at - begin), Math.min(PIECE_BYTES, end - at))
    },
    place: (at, piece) => place(copied, locations, { at, piece }),
  }
}

/**
 * Copies a piece of a file into the tensors that it has bytes of. Pieces come in order, so filled ranges are dropped.
 */
function place(
  ranges: Range[],
  locations: readonly StateLocation[],
  { at, piece }: { at: number; piece: Uint8Array },
): void {
  const until = at + piece.length
  while (ranges.length > 0 && ranges[0].begin < until) {
    const { begin, end, target } = ranges[0]
    const [from, to] = [Math.max(begin, at), Math.min(end, until)]
    const bytes = piece.subarray(from - at, to - at)
    if (bytes.length > 0) accessTo(locations[target.unit]).write(target.pointer + BigInt(from - begin), bytes)
    if (end > until) return
    ranges.shift()
  }
}

/**
 * Reads a file to its end, the next piece while one is hashed. Throws UnreadableError where its length or its hash is
 * not that of `FileRecord`.
 */
async function readThrough(
  { path, file }: Input,
  { bytes, sha256 }: FileRecord,
  { room, place }: Destination,
): Promise<void> {
  const hash = createHash('sha256')
  const buffers = [Buffer.allocUnsafeSlow(PIECE_BYTES), Buffer.allocUnsafeSlow(PIECE_BYTES)]
  const ask = async (at: number, index: number) => {
    const found = room(at)
    const own = typeof found !== 'number'
    const memory = own ? found : buffers[index % 2].subarray(0, found)
    const { bytesRead } = await file.read(memory, 0, memory.length, at)
    return { own, piece: memory.subarray(0, bytesRead) }
  }
  let at = 0
  let next = ask(0, 0)
  try {
    for (let index = 0; ; index++) {
      const { own, piece } = await next
      if (piece.length === 0) break
      next = ask(at + piece.length, index + 1)
      hash.update(piece)
      if (!own) place(at, piece)
      at += piece.length
    }
    if (at !== bytes) throw new UnreadableError(`${path} has ${at} bytes, expected ${bytes}`)
    const actual = hash.digest('hex')
    if (actual !== sha256) throw new UnreadableError(`${path} has SHA-256 ${actual}, expected ${sha256}`)
  } finally {
    // The system may still be reading into a buffer.
    await Promise.allSettled([next])
  }
}

async function openToRead(place: CheckpointPlace, name: string): Promise<OpenFile> {
  try {
    return await place.open(name)
  } catch (error) {
    if (error instanceof StoreError && !(error instanceof NoObjectError)) throw error
    throw new UnreadableError(`${place.name}/${name} cannot be opened: ${errorText(error)}`)
  }
}
