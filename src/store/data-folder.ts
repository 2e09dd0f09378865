import { access, constants, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { ConfigError } from '../config.js'
import { errorText } from '../errors.js'
import { CheckpointFiles } from './checkpoint/checkpoint-files.js'
import { makeFolder, syncFolder } from './durable.js'
import { type FolderLock, lockFolder } from './lock.js'
import { RunFolder } from './run-folder.js'

/** The folder of the setting `data`: a folder per run, and the lock that keeps other services out. */
export class DataFolder {
  /** Of the runs that were there when it was opened. */
  readonly names: readonly string[]
  readonly #runs: string
  readonly #lock: FolderLock
  readonly #files = new CheckpointFiles()

  /** Throws ConfigError where the folder cannot be written to, or another service has it. */
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
    // What is left of runs that were being deleted.
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

  /** Gives the folder free once everything that was asked for is written. */
  async close(): Promise<void> {
    await this.#files.close()
    this.#lock.release()
  }
}
