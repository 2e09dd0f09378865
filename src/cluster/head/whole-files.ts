import { readFile, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { errorText, ServiceError } from '../../errors.js'
import { hasCode, makeFolder, namesIn, replaceFile, syncFolder } from '../../store/durable.js'
import { FileLog } from './file-log.js'
import type { StoredWhole, WholeCheckpoint, WholeRecord, WholeStore } from './whole-store.js'
import { openCheckpoints, openRecord, sealCheckpoints, sealRecord } from './whole-texts.js'

// The folder of a whole at its head, `wholes/RUN` below the data folder: what it was created with, its log and its
// checkpoints. The process has locked the data folder, so nobody else writes here.

const WHOLE = 'whole.json'
const CHECKPOINTS = 'checkpoints.json'
const LOG = 'log.jsonl'

export class WholeFiles implements WholeStore {
  readonly isShared = false
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
    if (await this.has(run)) throw new ServiceError('RUN_EXISTS', `run '${run}' exists`)
    try {
      // One of the same name that was deleted may have left files here, its log among them.
      await rm(half, { recursive: true, force: true })
      await makeFolder(half)
      await replaceFile(join(half, WHOLE), sealRecord(record))
      await rename(half, folder)
    } catch (error) {
      throw storageFailed(`run '${run}' cannot be kept`, error)
    }
    try {
      await syncFolder(this.#folder)
      return { record, checkpoints: [], log: await FileLog.open(join(folder, LOG), this.#syncs) }
      /* c8 ignore start -- a disk that has just taken the file of the whole takes its log */
    } catch (error) {
      await this.remove(run).catch(() => undefined)
      throw storageFailed(`run '${run}' cannot be kept`, error)
    }
    /* c8 ignore stop */
  }

  async read(run: string): Promise<StoredWhole> {
    const folder = await this.#found(run)
    try {
      const record = openRecord(await readFile(join(folder, WHOLE), 'utf8'), WHOLE, run)
      const kept = await readIfThere(join(folder, CHECKPOINTS))
      const checkpoints = kept === undefined ? [] : openCheckpoints(kept, CHECKPOINTS)
      const log = await FileLog.open(join(folder, LOG), this.#syncs)
      return { record, checkpoints, log }
    } catch (error) {
      throw new ServiceError('CHECKPOINT_UNREADABLE', `run '${run}' in '${folder}': ${errorText(error)}`)
    }
  }

  async has(run: string): Promise<boolean> {
    try {
      return (await namesIn(this.#folder)).includes(run)
    } catch (error) {
      throw storageFailed(`'${this.#folder}' cannot be read`, error)
    }
  }

  async keepCheckpoints(run: string, checkpoints: readonly WholeCheckpoint[]): Promise<readonly WholeCheckpoint[]> {
    const folder = await this.#found(run)
    try {
      await replaceFile(join(folder, CHECKPOINTS), sealCheckpoints(checkpoints))
      return checkpoints
    } catch (error) {
      throw storageFailed(`the checkpoints of run '${run}' cannot be written`, error)
    }
  }

  /** Throws STORAGE_FAILED. */
  async remove(run: string): Promise<void> {
    const [folder, half] = [await this.#found(run), join(this.#folder, `.${run}`)]
    try {
      await rename(folder, half)
      await syncFolder(this.#folder)
      await rm(half, { recursive: true })
    } catch (error) {
      throw storageFailed(`the folder of run '${run}' cannot be removed`, error)
    }
  }

  async #found(run: string): Promise<string> {
    if (await this.has(run)) return join(this.#folder, run)
    throw new ServiceError('RUN_NOT_FOUND', `there is no run '${run}' over several processes`)
  }
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return undefined
    throw error
  }
}

function storageFailed(what: string, error: unknown): ServiceError {
  return new ServiceError('STORAGE_FAILED', `${what}: ${errorText(error)}`)
}
