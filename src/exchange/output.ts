import { type FileHandle, open, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { syncFolder } from '../store/durable.js'

/** A file or a folder that is to be written is there already. */
export class OutputExistsError extends Error {
  override readonly name = 'OutputExistsError'
}

/**
 * Has `work` write to other paths, which get the names `paths` once all of it is on the disk: what stands there is whole. Nothing
 * is left where `work` fails. Throws OutputExistsError where something stands there already.
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
    for (let at = 0; at < bytes.length; ) at += (await this.#file.write(bytes, at)).bytesWritten
    this.bytes += bytes.length
  }

  /** Closes it; what was written is on the disk then. */
  async end(): Promise<void> {
    await this.#file.sync()
    await this.#file.close()
  }

  /** Closes it, whatever has become of it. */
  async abandon(): Promise<void> {
    await this.#file.close()
  }
}

/** Has `work` write files, and closes all of them. */
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
