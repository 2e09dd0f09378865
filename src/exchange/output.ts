import { type FileHandle, open, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { syncFolder } from '../store/durable.js'
import { writeAll } from '../store/file-bytes.js'

/** A file or folder to be written exists already. */
export class OutputExistsError extends Error {
  override readonly name = 'OutputExistsError'
}

/**
 * Writes files or folders that are whole once they have their names: `work` writes to other paths, `partials`, which
 * are renamed to `paths` when it is done. Nothing is left where `work` fails. Throws OutputExistsError where a path
 * exists.
 */
export async function writeWhole(
  paths: readonly string[],
  work: (partials: readonly string[]) => Promise<void>,
): Promise<void> {
  for (const path of paths) {
    if (await stat(path).catch(() => undefined)) throw new OutputExistsError(`${path} exists already`)
  }
  const partials = paths.map((path) => `${path}.partial`)
  const clear = async () => {
    for (const partial of partials) await rm(partial, { recursive: true, force: true })
  }
  await clear()
  try {
    await work(partials)
    for (const [i, path] of paths.entries()) await rename(partials[i], path)
    for (const folder of new Set(paths.map(dirname))) await syncFolder(folder)
  } finally {
    await clear()
  }
}

/** A file that is written from front to back. */
export class OutputFile {
  bytes = 0
  readonly #file: FileHandle

  private constructor(file: FileHandle) {
    this.#file = file
  }

  static async create(path: string): Promise<OutputFile> {
    return new OutputFile(await open(path, 'wx'))
  }

  async write(bytes: Uint8Array): Promise<void> {
    await writeAll(this.#file, bytes)
    this.bytes += bytes.length
  }

  /** Syncs the file to the disk and closes it. */
  async end(): Promise<void> {
    await this.#file.sync()
    await this.#file.close()
  }

  /** Closes the file without a sync: something has failed. */
  async abandon(): Promise<void> {
    await this.#file.close()
  }
}

/** Creates files, has `work` write them, and closes all of them; they are on the disk when it resolves. */
export async function writeFiles(
  paths: readonly string[],
  work: (files: OutputFile[]) => Promise<void>,
): Promise<void> {
  const files: OutputFile[] = []
  try {
    for (const path of paths) files.push(await OutputFile.create(path))
    await work(files)
    while (files.length > 0) await files[files.length - 1].end().finally(() => files.pop())
  } finally {
    for (const file of files) await file.abandon()
  }
}
