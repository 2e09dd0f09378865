import { createHash, randomUUID } from 'node:crypto'
import { type FileHandle, link, open, readdir, readFile, rename, rm, stat } from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import { FILE_MODE, hasCode, makeFolder, namesIn, syncFolder } from '../durable.js'
import { writeAll } from '../file-bytes.js'
import { type Objects, type StoredObject, StoreError, type Unfinished, type Upload, type Version } from './objects.js'
import type { ObjectsAddress } from './open-objects.js'

/** Where what is being written lies until it is whole. No key begins with a dot. */
const UNFINISHED = '.unfinished'

/**
 * Objects as files of a folder, a key being a path. Writes that depend on a version are for one process alone: between
 * two of them nothing keeps the comparison and the writing together.
 */
export class FolderObjects implements Objects {
  readonly name: string
  readonly #root: string
  #turn: Promise<unknown> = Promise.resolve()

  constructor(root: string) {
    this.name = root
    this.#root = root
  }

  async get(key: string): Promise<StoredObject | undefined> {
    const bytes = await present(readFile(this.#pathOf(key)))
    return bytes && { bytes, version: versionOf(bytes) }
  }

  async size(key: string): Promise<number | undefined> {
    return (await present(stat(this.#pathOf(key))))?.size
  }

  async readInto(memory: Uint8Array, key: string, at: number): Promise<void> {
    const file = await open(this.#pathOf(key), 'r')
    try {
      for (let done = 0; done < memory.length; ) {
        const { bytesRead } = await file.read(memory, done, memory.length - done, at + done)
        if (bytesRead === 0) throw new Error(`${key} ends after ${at + done} bytes`)
        done += bytesRead
      }
    } finally {
      await file.close()
    }
  }

  async put(key: string, bytes: Uint8Array): Promise<void> {
    await this.#place(key, bytes, rename)
  }

  async putIfAbsent(key: string, bytes: Uint8Array): Promise<Version | undefined> {
    try {
      await this.#place(key, bytes, async (fresh, path) => {
        await link(fresh, path)
        await rm(fresh)
      })
      return versionOf(bytes)
    } catch (error) {
      if (hasCode(error, 'EEXIST')) return undefined
      /* c8 ignore next 2 -- needs a disk that fails */
      throw error
    }
  }

  putIfUnchanged(key: string, bytes: Uint8Array, version: Version): Promise<Version | undefined> {
    const write = async () => {
      if ((await this.get(key))?.version !== version) return undefined
      await this.put(key, bytes)
      return versionOf(bytes)
    }
    const turn = this.#turn.then(write)
    this.#turn = turn.catch(() => undefined)
    return turn
  }

  async *list(prefix: string, after = ''): AsyncGenerator<string> {
    const entries = (await present(readdir(this.#root, { recursive: true, withFileTypes: true }))) ?? []
    const files = entries.filter((entry) => entry.isFile())
    const keys = files.map(({ parentPath, name }) => relative(this.#root, join(parentPath, name)))
    for (const key of keys.sort()) if (key.startsWith(prefix) && !key.startsWith(UNFINISHED) && key > after) yield key
  }

  async copyFrom(place: ObjectsAddress, from: string, to: string): Promise<boolean> {
    /* c8 ignore next -- the places of a cluster are of one kind */
    if (place.kind !== 'folder') throw new StoreError(`${this.name}: ${from} cannot be copied out of S3`)
    const source = await present(readFile(join(place.root, from)))
    if (source) await this.put(to, source)
    return source !== undefined
  }

  async delete(keys: readonly string[]): Promise<void> {
    for (const key of keys) await rm(this.#pathOf(key), { force: true })
  }

  upload(key: string): Upload {
    return new FolderUpload(join(this.#root, UNFINISHED, unfinishedName(key)), this.#pathOf(key))
  }

  async *unfinished(prefix: string): AsyncGenerator<Unfinished> {
    for (const id of await namesIn(join(this.#root, UNFINISHED))) {
      const key = decodeURIComponent(id.slice(0, id.lastIndexOf('@')))
      if (key.startsWith(prefix)) yield { key, id }
    }
  }

  abort({ id }: Unfinished): Promise<void> {
    return rm(join(this.#root, UNFINISHED, id), { force: true })
  }

  #pathOf(key: string): string {
    return join(this.#root, key)
  }

  async #place(key: string, bytes: Uint8Array, settle: (fresh: string, path: string) => Promise<void>): Promise<void> {
    const upload = new FolderUpload(join(this.#root, UNFINISHED, unfinishedName(key)), this.#pathOf(key), settle)
    try {
      await upload.write(bytes)
      await upload.end()
    } catch (error) {
      await upload.abort()
      throw error
    }
  }
}

/** A file that is written beside the others, and put in its place when it is whole. */
class FolderUpload implements Upload {
  readonly #fresh: string
  readonly #path: string
  readonly #settle: (fresh: string, path: string) => Promise<void>
  #file: FileHandle | undefined

  constructor(fresh: string, path: string, settle: (fresh: string, path: string) => Promise<void> = rename) {
    this.#fresh = fresh
    this.#path = path
    this.#settle = settle
  }

  async write(bytes: Uint8Array): Promise<void> {
    await writeAll(await this.#open(), bytes)
  }

  async end(): Promise<void> {
    const file = await this.#open()
    await file.sync()
    await this.#close()
    const folder = dirname(this.#path)
    await makeFolder(folder)
    await this.#settle(this.#fresh, this.#path)
    await syncFolder(folder)
  }

  async abort(): Promise<void> {
    await this.#close()
    await rm(this.#fresh, { force: true })
  }

  async #open(): Promise<FileHandle> {
    if (this.#file) return this.#file
    await makeFolder(dirname(this.#fresh))
    this.#file = await open(this.#fresh, 'w', FILE_MODE)
    return this.#file
  }

  async #close(): Promise<void> {
    await this.#file?.close()
    this.#file = undefined
  }
}

function unfinishedName(key: string): string {
  return `${encodeURIComponent(key)}@${randomUUID()}`
}

function versionOf(bytes: Uint8Array): Version {
  return createHash('sha256').update(bytes).digest('hex')
}

/** What a call of the file system answers; undefined where there is no such file. */
async function present<T>(work: Promise<T>): Promise<T | undefined> {
  try {
    return await work
  } catch (error) {
    if (hasCode(error, 'ENOENT') || hasCode(error, 'ENOTDIR')) return undefined
    /* c8 ignore next 2 -- needs a disk that fails */
    throw error
  }
}
