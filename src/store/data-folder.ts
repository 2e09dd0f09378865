import { access, constants, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { ConfigError } from '../config.js'
import { errorText } from '../errors.js'
import { CheckpointFiles } from './checkpoint/checkpoint-files.js'
import { makeFolder, syncFolder } from './durable.js'
import { type FolderLock, lockFolder } from './lock.js'
import { RunFolder } from './run-folder.js'

/** The folder of the setting `data`: it has a folder for each run, and a lock that keeps other services out. */
export class DataFolder {
  /** The names of the runs that were in the folder when it was opened. */
  readonly names: readonly string[]
  readonly #runs: string
  readonly #lock: FolderLock
  readonly #files = new CheckpointFiles()

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
    for (const name of names.filter((name) => name.startsWith('.'))) await rm(join(runs, name), { recursive: true })
    return new DataFolder(
      runs,
      lock,
      names.filter((name) => !name.startsWith('.')),
    )
  }

  private constructor(runs: string, lock: FolderLock, names: readonly string[]) {
    this.#runs = runs
    this.#lock = lock
    this.names = names
  }

  create(run: string): Promise<RunFolder> {
    return RunFolder.create(join(this.#runs, run), this.#files, run)
  }

  find(run: string): Promise<RunFolder> {
    return RunFolder.open(join(this.#runs, run), this.#files)
  }

  /** Unlocks the folder once every checkpoint that was asked for is written. */
  async close(): Promise<void> {
    await this.#files.close()
    this.#lock.release()
  }
}
