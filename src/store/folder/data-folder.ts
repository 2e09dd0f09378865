import { access, constants, readdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { ConfigError } from '../../config.js'
import { errorText } from '../../errors.js'
import { CheckpointFiles } from '../checkpoint/checkpoint-files.js'
import type { DataStore } from '../data-store.js'
import { FILE_MODE, makeFolder, syncFolder } from '../durable.js'
import { type Lock, lockFolder } from '../lock.js'
import { RunStore } from '../run-store.js'
import { destroyRun, RunFolder } from './run-folder.js'

const PROBE_MS = 1000
const PROBE_BYTES = 4096

/** The folder of the setting `data`: a folder per run, and the lock that keeps other services out. */
export class DataFolder implements DataStore {
  /** The names of the runs that were in the folder when it was opened. */
  readonly names: readonly string[]
  /** Never: the lock lasts as long as the process. */
  readonly lost = new Promise<string>(() => {})
  readonly #runs: string
  readonly #lock: Lock
  readonly #files = new CheckpointFiles()
  readonly #path: string
  #probedAt = Number.NEGATIVE_INFINITY
  #probe: Promise<string | undefined> = Promise.resolve(undefined)

  /** Opens and locks a folder. Throws ConfigError where it cannot be written to, or another service has it locked. */
  static async open(path: string, wait_seconds: number): Promise<DataFolder> {
    const runs = join(path, 'runs')
    try {
      await makeFolder(runs)
      await access(path, constants.W_OK)
      await access(runs, constants.W_OK)
    } catch (error) {
      throw new ConfigError(`data folder '${path}' is not writable: ${errorText(error)}`)
    }
    const lock = await lockFolder(path, wait_seconds)
    await syncFolder(path)
    const names = (await readdir(runs)).sort()
    // A name with a dot is of a run that was being deleted.
    const deleted = names.filter((name) => name.startsWith('.'))
    await Promise.all(deleted.map((name) => rm(join(runs, name), { recursive: true })))
    const kept = names.filter((name) => !deleted.includes(name))
    return new DataFolder(path, lock, kept)
  }

  private constructor(path: string, lock: Lock, names: readonly string[]) {
    this.#path = path
    this.#runs = join(path, 'runs')
    this.#lock = lock
    this.names = names
  }

  /** Why nothing can be written, undefined where something can; tried at most once a second. */
  problem(): Promise<string | undefined> {
    if (performance.now() - this.#probedAt > PROBE_MS) {
      this.#probedAt = performance.now()
      this.#probe = probe(this.#path)
    }
    return this.#probe
  }

  create(run: string): Promise<RunStore> {
    return RunStore.create(this.#folderOf(run), run)
  }

  find(run: string): Promise<RunStore> {
    return RunStore.open(this.#folderOf(run))
  }

  /** Removes a run from the disk, whatever its files are. */
  destroy(run: string): Promise<void> {
    return destroyRun(join(this.#runs, run))
  }

  /** Unlocks the folder once every checkpoint that was asked for is written. */
  async close(): Promise<void> {
    await this.#files.close()
    this.#lock.release()
  }

  #folderOf(run: string): RunFolder {
    return new RunFolder(join(this.#runs, run), this.#files)
  }
}

/** Writes a block and takes it away again. */
async function probe(folder: string): Promise<string | undefined> {
  const file = join(folder, 'probe')
  try {
    await writeFile(file, new Uint8Array(PROBE_BYTES), { mode: FILE_MODE })
    await rm(file)
    return undefined
  } catch (error) {
    await rm(file, { force: true }).catch(() => undefined)
    return `the data folder cannot be written: ${errorText(error)}`
  }
}
