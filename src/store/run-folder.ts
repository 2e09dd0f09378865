import { randomUUID } from 'node:crypto'
import { lstat, readdir, readFile, rename, rm, unlink } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import type { StateLocation } from '../device/state-access.js'
import { errorText } from '../errors.js'
import type { CheckpointFiles } from './checkpoint/checkpoint-files.js'
import {
  type DeviceRecord,
  FORMAT,
  type Manifest,
  openManifest,
  type RunRecord,
  sealManifest,
  UnreadableError,
} from './checkpoint/manifest.js'
import { indexText, planShards, type StateEntry, type TensorLocation } from './checkpoint/state-files.js'
import { makeFolder, replaceFile, syncFolder } from './durable.js'
import { type Identity, openIdentity, sealIdentity } from './identity.js'

/** A checkpoint on the disk. `problem` says why it cannot be read. */
export type CheckpointEntry = {
  checkpoint: string
  tags: readonly string[]
  step: number
  digest: string
  bytes: number
  written_at: string
  problem?: string
}

/** A checkpoint to be written. */
export type Snapshot = {
  tags: readonly string[]
  server: string
  device: DeviceRecord
  record: RunRecord
  entries: readonly StateEntry[]
  locations: readonly StateLocation[]
  /** Most bytes of tensors in a file, unless one tensor alone has more. */
  file_bytes: number
}

export const MANIFEST = 'manifest.json'
const IDENTITY = 'run.json'
/** Of a step; one of the same step after its state was imported has a number behind it. */
const CHECKPOINT = /^step-(\d{12})(?:\.(\d{1,9}))?$/

/**
 * The folder of one run: `run.json`, `checkpoints/step-000000001200/` and `journal/`. A checkpoint counts once it has
 * its manifest. After a restart the run goes on from the newest checkpoint and the journal behind it.
 */
export class RunFolder {
  readonly path: string
  readonly #files: CheckpointFiles
  /** Oldest first. */
  #entries: CheckpointEntry[]

  private constructor(path: string, files: CheckpointFiles, entries: CheckpointEntry[]) {
    this.path = path
    this.#files = files
    this.#entries = entries
  }

  static async create(path: string, files: CheckpointFiles, run: string): Promise<RunFolder> {
    await makeFolder(path)
    await makeFolder(join(path, 'checkpoints'))
    await makeFolder(join(path, 'journal'))
    const folder = new RunFolder(path, files, [])
    await folder.identify({ run, epoch: 0 })
    await syncFolder(dirname(path))
    return folder
  }

  /** Lists what is there and removes what a crash left unfinished. Throws UnreadableError for a symbolic link. */
  static async open(path: string, files: CheckpointFiles): Promise<RunFolder> {
    if ((await lstat(path)).isSymbolicLink()) {
      throw new UnreadableError(
        `${path} is a symbolic link: the same folder may be another run's, or another service's`,
      )
    }
    const folder = join(path, 'checkpoints')
    await makeFolder(folder)
    const names = checkpointNames(await readdir(folder))
    const entries: CheckpointEntry[] = []
    for (const name of names) {
      if ((await readdir(join(folder, name))).includes(MANIFEST))
        entries.push(await readEntry(join(folder, name), name))
      else await rm(join(folder, name), { recursive: true })
    }
    return new RunFolder(path, files, entries)
  }

  get journal(): string {
    return join(this.path, 'journal')
  }

  get checkpoints(): readonly CheckpointEntry[] {
    return this.#entries
  }

  get newest(): CheckpointEntry | undefined {
    return this.#entries.at(-1)
  }

  /** A checkpoint by its id, or the newest one with a tag. */
  find(name: string): CheckpointEntry | undefined {
    return (
      this.#entries.find(({ checkpoint }) => checkpoint === name) ??
      this.#entries.findLast(({ tags }) => tags.includes(name))
    )
  }

  async identity(): Promise<Identity> {
    const path = join(this.path, IDENTITY)
    const text = await readFile(path, 'utf8').catch((error) => {
      throw new UnreadableError(`${path} cannot be read: ${errorText(error)}`)
    })
    return openIdentity(text, path, basename(this.path))
  }

  identify(identity: Identity): Promise<void> {
    return replaceFile(join(this.path, IDENTITY), sealIdentity(identity))
  }

  /** Writes a checkpoint; `released` is called with the position of each entry once its memory is not read any more. */
  async write(snapshot: Snapshot, released: (position: number) => void): Promise<CheckpointEntry> {
    const { record, entries, locations, tags, server, device, file_bytes } = snapshot
    const checkpoint = this.#freshId(record)
    const files = planShards(entries, file_bytes)
    const manifest = {
      ...{ format: FORMAT, checkpoint, tags, written_at: new Date().toISOString(), server, device },
      ...record,
      momentum_form: Object.fromEntries(
        record.groups.map(({ name, hyperparameters }) => [name, hyperparameters.momentum_form]),
      ),
      dtypes: Object.fromEntries(entries.map(({ name, dtype }) => [name, dtype])),
    }
    const texts = [
      { name: 'state.safetensors.index.json', text: indexText(files) },
      { name: 'param_groups.json', text: groupsText(record) },
    ]
    const folder = this.#folderOf(checkpoint)
    const written = await this.#files.write({ folder, locations, files, texts, manifest }, released)
    const entry = entryOf(written)
    this.#entries = [...this.#entries, entry]
    return entry
  }

  /** Reads a checkpoint's manifest. Throws UnreadableError. */
  async manifest({ checkpoint }: CheckpointEntry): Promise<Manifest> {
    const path = join(this.#folderOf(checkpoint), MANIFEST)
    return openManifest(await readFile(path, 'utf8'), path)
  }

  /** Reads a checkpoint's tensors into `targets`, by name, and checks every file's hash. Throws UnreadableError. */
  read(
    { checkpoint, files }: Manifest,
    targets: ReadonlyMap<string, TensorLocation & { dtype: string; shape: readonly number[] }>,
    locations: readonly StateLocation[],
  ): Promise<void> {
    return this.#files.read({ folder: this.#folderOf(checkpoint), files, targets, locations })
  }

  /** Adds a tag to a checkpoint. */
  async tag(entry: CheckpointEntry, tag: string): Promise<CheckpointEntry> {
    if (entry.tags.includes(tag)) return entry
    const manifest = { ...(await this.manifest(entry)), tags: [...entry.tags, tag] }
    await replaceFile(join(this.#folderOf(entry.checkpoint), MANIFEST), sealManifest(manifest))
    const tagged = entryOf(manifest)
    this.#entries = this.#entries.map((other) => (other.checkpoint === entry.checkpoint ? tagged : other))
    return tagged
  }

  /** Removes all checkpoints but the `kept` newest and those that `find` finds by a tag. */
  async retain(kept: number): Promise<void> {
    const tagged = new Set(this.#entries.flatMap(({ tags }) => tags.map((tag) => this.find(tag))))
    const untagged = this.#entries.filter((entry) => !tagged.has(entry))
    for (const entry of untagged.slice(0, Math.max(0, untagged.length - kept))) await this.remove(entry)
  }

  /** Removes the checkpoints after the one of `step` and `digest`, the newest first: a crash leaves the older ones. */
  async removeAfter({ step, digest }: Pick<CheckpointEntry, 'step' | 'digest'>): Promise<void> {
    const at = this.#entries.findLastIndex(
      (entry) => entry.step < step || (entry.step === step && entry.digest === digest),
    )
    for (const entry of this.#entries.slice(at + 1).reverse()) await this.remove(entry)
  }

  /** Removes a checkpoint, its manifest first: without one it does not count, whatever a crash leaves of it. */
  async remove(entry: CheckpointEntry): Promise<void> {
    const folder = this.#folderOf(entry.checkpoint)
    await unlink(join(folder, MANIFEST))
    await syncFolder(folder)
    this.#entries = this.#entries.filter((other) => other !== entry)
    await rm(folder, { recursive: true })
  }

  /** Removes the run from the disk. After a crash the run is there as a whole or not at all: renaming is atomic. */
  async destroy(): Promise<void> {
    const doomed = join(dirname(this.path), `.deleted-${randomUUID()}`)
    await rename(this.path, doomed)
    await syncFolder(dirname(this.path))
    await rm(doomed, { recursive: true })
  }

  /** An id that no checkpoint has. One is never written over another one: a crash in between would leave neither. */
  #freshId({ step, imported }: RunRecord): string {
    const id = `step-${String(step).padStart(12, '0')}`
    const taken = this.#entries.filter((entry) => entry.step === step).map(({ checkpoint }) => numbersOf(checkpoint)[1])
    return taken.length === 0 && !imported ? id : `${id}.${Math.max(0, ...taken) + 1}`
  }

  #folderOf(checkpoint: string): string {
    return join(this.path, 'checkpoints', checkpoint)
  }
}

/** The names among `names` that are ids of checkpoints, oldest first. */
export function checkpointNames(names: readonly string[]): string[] {
  return names.filter((name) => CHECKPOINT.test(name)).sort(byAge)
}

/** The step in a checkpoint's id, and the number behind it, 0 where there is none. */
function numbersOf(checkpoint: string): [step: number, number: number] {
  const [step, number = 0] = checkpoint.slice('step-'.length).split('.')
  return [Number(step), Number(number)]
}

function byAge(one: string, other: string): number {
  const [a, b] = [numbersOf(one), numbersOf(other)]
  return a[0] - b[0] || a[1] - b[1]
}

export function isCheckpointId(name: string): boolean {
  return CHECKPOINT.test(name)
}

function entryOf({ checkpoint, tags, bytes, written_at, step, digest }: Manifest): CheckpointEntry {
  return { checkpoint, tags, step, digest, bytes, written_at }
}

async function readEntry(folder: string, checkpoint: string): Promise<CheckpointEntry> {
  const path = join(folder, MANIFEST)
  try {
    return entryOf(openManifest(await readFile(path, 'utf8'), path))
  } catch (error) {
    const problem = errorText(error)
    const [step] = numbersOf(checkpoint)
    return { checkpoint, tags: [], step, digest: '', bytes: 0, written_at: '', problem }
  }
}

/** Every hyperparameter under torch.distributed's flattened name for it, `param_groups.<parameter>.<key>`, as JSON. */
function groupsText({ parameters, groups }: RunRecord): string {
  const byName = Object.fromEntries(
    groups.map(({ name, algorithm, hyperparameters }) => [name, { algorithm, ...hyperparameters }]),
  )
  const rows = parameters.flatMap(({ name, group }) =>
    Object.entries(byName[group]).map(([key, value]) => [`param_groups.${name}.${key}`, value] as const),
  )
  return `${JSON.stringify(Object.fromEntries(rows), null, 2)}\n`
}
