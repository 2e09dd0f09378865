import { type FileHandle, open, readFile, rename, rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { errorText, ServiceError } from '../../errors.js'
import { FILE_MODE, hasCode, makeFolder, namesIn, replaceFile, syncFolder } from '../../store/durable.js'
import { writeAll } from '../../store/file-bytes.js'
import type { AttentionDeclaration, GroupDeclaration, ParameterDeclaration } from '../../wire/frame.js'
import type { AssignedShard } from '../assignment.js'
import type { CommitLog, Entry } from '../commit-log.js'

// The folder of a whole at its head, `wholes/RUN` below the data folder: what it was created with, its log and its
// checkpoints. The process has locked the data folder, so nobody else writes here.

/** A checkpoint of a whole: those of its shards, in their order, after one step. */
export type WholeCheckpoint = {
  readonly checkpoint: string
  readonly tag?: string
  readonly step: number
  readonly digest: string
  readonly shards: readonly string[]
}

/** What a whole was created with. */
export type WholeRecord = {
  readonly run: string
  readonly created_at: string
  readonly groups: readonly GroupDeclaration[]
  readonly parameters: readonly ParameterDeclaration[]
  readonly attentions: readonly AttentionDeclaration[]
  readonly shards: readonly AssignedShard[]
}

const WHOLE = 'whole.json'
const CHECKPOINTS = 'checkpoints.json'
const LOG = 'log.jsonl'

/** A whole that was read from its folder. */
export type StoredWhole = { record: WholeRecord; checkpoints: WholeCheckpoint[]; log: FileLog }

export class WholeFiles {
  readonly #folder: string
  readonly #syncs: boolean

  /** `syncs`: an entry of the log is on the disk before it counts. */
  constructor(data: string, syncs: boolean) {
    this.#folder = join(data, 'wholes')
    this.#syncs = syncs
  }

  async names(): Promise<string[]> {
    const names = await namesIn(this.#folder)
    // A name with a dot is of a whole that was being made or deleted.
    const half = names.filter((name) => name.startsWith('.'))
    await Promise.all(half.map((name) => rm(join(this.#folder, name), { recursive: true })))
    return names.filter((name) => !half.includes(name)).sort()
  }

  /** Throws STORAGE_FAILED, and then there is no such whole. */
  async create(record: WholeRecord): Promise<StoredWhole> {
    const { run } = record
    const [folder, half] = [join(this.#folder, run), join(this.#folder, `.${run}`)]
    try {
      // One of the same name that was deleted may have left files here, its log among them.
      await rm(half, { recursive: true, force: true })
      await makeFolder(half)
      await replaceFile(join(half, WHOLE), JSON.stringify(record))
      await rename(half, folder)
    } catch (error) {
      throw storageFailed(`run '${run}' cannot be kept`, error)
    }
    try {
      await syncFolder(this.#folder)
      return { record, checkpoints: [], log: await FileLog.open(join(folder, LOG), this.#syncs) }
      /* c8 ignore start -- a disk that has just taken the file of the whole takes its log */
    } catch (error) {
      await this.discard(run)
      throw storageFailed(`run '${run}' cannot be kept`, error)
    }
    /* c8 ignore stop */
  }

  /** Removes a whole that could not be begun. Where that fails too, its name is taken until the next start. */
  async discard(run: string): Promise<void> {
    /* c8 ignore next -- a disk that has just taken the folder lets it be removed */
    await this.remove(run).catch(() => undefined)
  }

  /** Throws CHECKPOINT_UNREADABLE for files that are not what was written. */
  async read(run: string): Promise<StoredWhole> {
    const folder = join(this.#folder, run)
    try {
      const record = recordIn(await readFile(join(folder, WHOLE), 'utf8'), run)
      const checkpoints = checkpointsIn(await readIfThere(join(folder, CHECKPOINTS)))
      const log = await FileLog.open(join(folder, LOG), this.#syncs)
      return { record, checkpoints, log }
    } catch (error) {
      throw new ServiceError('CHECKPOINT_UNREADABLE', `run '${run}' in '${folder}': ${errorText(error)}`)
    }
  }

  async keepCheckpoints(run: string, checkpoints: readonly WholeCheckpoint[]): Promise<void> {
    try {
      await replaceFile(join(this.#folder, run, CHECKPOINTS), JSON.stringify(checkpoints))
    } catch (error) {
      throw storageFailed(`the checkpoints of run '${run}' cannot be written`, error)
    }
  }

  /** Throws STORAGE_FAILED. */
  async remove(run: string): Promise<void> {
    const half = join(this.#folder, `.${run}`)
    try {
      await rename(join(this.#folder, run), half)
      await syncFolder(this.#folder)
      await rm(half, { recursive: true })
    } catch (error) {
      throw storageFailed(`the folder of run '${run}' cannot be removed`, error)
    }
  }
}

/** A log in a file, a line for each entry. It grows by about a kilobyte with each step. */
export class FileLog implements CommitLog {
  readonly isDurable: boolean
  readonly #path: string
  readonly #file: FileHandle
  /** Where each line begins, and where the next one will. */
  readonly #starts: number[]
  #newest: Entry | undefined
  #last: Promise<unknown> = Promise.resolve()

  /** Throws where the last line is no entry. One that a crash has cut off was never answered for, and is dropped. */
  static async open(path: string, syncs: boolean): Promise<FileLog> {
    const file = await open(path, 'a+', FILE_MODE).then(async (made) => {
      await made.close()
      return open(path, 'r+')
    })
    try {
      await syncFolder(dirname(path))
      const text = await file.readFile()
      const starts = [0]
      for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n', end + 1)) starts.push(end + 1)
      const line = (position: number) => text.subarray(starts[position - 1], starts[position]).toString()
      const newest = starts.length > 1 ? entryOf(line(starts.length - 1), starts.length - 1) : undefined
      await file.truncate(starts.at(-1))
      return new FileLog({ path, file, syncs, starts, newest })
    } catch (error) {
      await file.close()
      throw error
    }
  }

  private constructor({
    path,
    file,
    syncs,
    starts,
    newest,
  }: {
    path: string
    file: FileHandle
    syncs: boolean
    starts: number[]
    newest: Entry | undefined
  }) {
    this.#path = path
    this.#file = file
    this.isDurable = syncs
    this.#starts = starts
    this.#newest = newest
  }

  put(entry: Entry): Promise<Entry> {
    const put = this.#last.then(() => this.#put(entry))
    this.#last = put.catch(() => undefined)
    return put
  }

  /** Throws CHECKPOINT_UNREADABLE for a line that is not the entry of its position. */
  async read(position: number): Promise<Entry | undefined> {
    const [start, end] = [this.#starts[position - 1], this.#starts[position]]
    if (start === undefined || end === undefined) return undefined
    const { buffer } = await this.#file.read(Buffer.alloc(end - start), 0, end - start, start)
    try {
      return entryOf(buffer.toString(), position)
    } catch (error) {
      throw new ServiceError('CHECKPOINT_UNREADABLE', `'${this.#path}': ${errorText(error)}`)
    }
  }

  async newest(): Promise<Entry | undefined> {
    return this.#newest
  }

  async close(): Promise<void> {
    await this.#last
    await this.#file.close()
  }

  async #put(entry: Entry): Promise<Entry> {
    const next = this.#starts.length
    const standing = await this.read(entry.position)
    if (standing) return standing
    if (entry.position !== next)
      throw new RangeError(`entry ${entry.position} is put behind entry ${next - 1}: the log would have a gap`)
    const line = Buffer.from(`${JSON.stringify(entry)}\n`)
    const start = this.#starts[next - 1]
    try {
      await writeAll(this.#file, line, start)
      if (this.isDurable) await this.#file.datasync()
    } catch (error) {
      // What a write that failed has left is written over, and may be longer than what comes next.
      await this.#file.truncate(start).catch(() => undefined)
      throw storageFailed(`'${this.#path}' cannot be written`, error)
    }
    this.#starts.push(start + line.length)
    this.#newest = entry
    return entry
  }
}

function recordIn(text: string, run: string): WholeRecord {
  const record: WholeRecord = JSON.parse(text)
  const { groups, parameters, attentions, shards } = record
  if (record.run === run && [groups, parameters, attentions, shards].every(Array.isArray)) return record
  throw new Error(`${WHOLE} is not that of this run`)
}

function checkpointsIn(text = '[]'): WholeCheckpoint[] {
  const checkpoints: WholeCheckpoint[] = JSON.parse(text)
  if (Array.isArray(checkpoints) && checkpoints.every(({ shards }) => Array.isArray(shards))) return checkpoints
  throw new Error(`${CHECKPOINTS} is no list of checkpoints`)
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return undefined
    throw error
  }
}

function entryOf(line: string, position: number): Entry {
  const entry: Entry = JSON.parse(line)
  if (entry.position === position && Array.isArray(entry.shards)) return entry
  throw new Error(`line ${position} of the log has entry ${entry.position}`)
}

function storageFailed(what: string, error: unknown): ServiceError {
  return new ServiceError('STORAGE_FAILED', `${what}: ${errorText(error)}`)
}
