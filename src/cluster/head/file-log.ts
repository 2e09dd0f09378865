import { type FileHandle, open } from 'node:fs/promises'
import { dirname } from 'node:path'
import { errorText, ServiceError } from '../../errors.js'
import { FILE_MODE, syncFolder } from '../../store/durable.js'
import { readBytes, readRange, writeAll } from '../../store/file-bytes.js'
import type { Entry } from '../commit-log.js'
import type { StoredLog } from './whole-store.js'
import { openEntry, sealEntry } from './whole-texts.js'

type Parts = { path: string; file: FileHandle; syncs: boolean; starts: number[] }

/** A log in a file, a line for each entry. It grows by about a kilobyte with each step. */
export class FileLog implements StoredLog {
  readonly isDurable: boolean
  readonly #path: string
  readonly #file: FileHandle
  /** Where each line begins, and where the next one will. */
  readonly #starts: number[]
  #newest: Entry | undefined
  #last: Promise<unknown> = Promise.resolve()

  /**
   * `syncs`: an entry is on the disk before it counts. Throws where the last line is no entry. One that a crash has cut
   * off was never answered for, and is dropped.
   */
  static async open(path: string, syncs: boolean): Promise<FileLog> {
    const file = await open(path, 'a+', FILE_MODE).then(async (made) => {
      await made.close()
      return open(path, 'r+')
    })
    try {
      await syncFolder(dirname(path))
      const starts = await startsOfLines(file)
      const log = new FileLog({ path, file, syncs, starts })
      log.#newest = await log.#entryAt(starts.length - 1)
      await file.truncate(starts.at(-1))
      return log
    } catch (error) {
      await file.close()
      throw error
    }
  }

  private constructor({ path, file, syncs, starts }: Parts) {
    this.#path = path
    this.#file = file
    this.isDurable = syncs
    this.#starts = starts
  }

  put(entry: Entry): Promise<Entry> {
    const put = this.#last.then(() => this.#put(entry))
    this.#last = put.catch(() => undefined)
    return put
  }

  /** Throws CHECKPOINT_UNREADABLE for a line that is not the entry of its position. */
  async read(position: number): Promise<Entry | undefined> {
    try {
      return await this.#entryAt(position)
    } catch (error) {
      throw new ServiceError('CHECKPOINT_UNREADABLE', errorText(error))
    }
  }

  async newest(): Promise<Entry | undefined> {
    return this.#newest
  }

  async close(): Promise<void> {
    await this.#last
    await this.#file.close()
  }

  async #entryAt(position: number): Promise<Entry | undefined> {
    const [start, end] = [this.#starts[position - 1], this.#starts[position]]
    if (start === undefined || end === undefined) return undefined
    const line = await readBytes(this.#file, start, end - start - 1)
    return openEntry(line.toString(), position, `'${this.#path}': line ${position}`)
  }

  async #put(entry: Entry): Promise<Entry> {
    const next = this.#starts.length
    const standing = await this.read(entry.position)
    if (standing) return standing
    if (entry.position !== next)
      throw new RangeError(`entry ${entry.position} is put behind entry ${next - 1}: the log would have a gap`)
    const line = Buffer.from(`${sealEntry(entry)}\n`)
    const start = this.#starts[next - 1]
    try {
      await writeAll(this.#file, line, start)
      if (this.isDurable) await this.#file.datasync()
    } catch (error) {
      // What a write that failed has left is written over, and may be longer than what comes next.
      await this.#file.truncate(start).catch(() => undefined)
      throw new ServiceError('STORAGE_FAILED', `'${this.#path}' cannot be written: ${errorText(error)}`)
    }
    this.#starts.push(start + line.length)
    this.#newest = entry
    return entry
  }
}

/** Where each line of a file begins, and where the next one will. The file is read in pieces: it may be long. */
async function startsOfLines(file: FileHandle): Promise<number[]> {
  const { size } = await file.stat()
  const starts = [0]
  let at = 0
  for await (const piece of readRange(file, 0, size)) {
    for (let end = piece.indexOf(NEWLINE); end >= 0; end = piece.indexOf(NEWLINE, end + 1)) starts.push(at + end + 1)
    at += piece.length
  }
  return starts
}

const NEWLINE = 0x0a
