import { type FileHandle, open, stat, unlink } from 'node:fs/promises'
import { join } from 'node:path'
import { errorText, ServiceError } from '../../errors.js'
import { FILE_MODE, makeFolder, namesIn, syncFolder } from '../durable.js'
import { type AppliedHead, type EndHead, encodeHead } from './journal-format.js'

/**
 * A file of a journal, with the records of step `first` and later ones. Where it is open as `file` that is read: it
 * stays readable when somebody removes the path.
 */
export type Segment = { first: number; path: string; bytes: number; file?: FileHandle }

/** `what` opens every error message; the steps up to `checkpointed` are in a checkpoint. */
export type JournalOptions = { what: string; checkpointed: number }

type Append = { buffers: Uint8Array[]; written: () => void }
type Rotate = { first: number; rotated: () => void; failed: (error: unknown) => void }
type Task = Append | Rotate

const SEGMENT = /^(\d{12})\.journal$/
// Linux takes 1024 buffers in one writev; a record has two.
const MOST_RECORDS = 256
// A sync begins after so many bytes, so that the disk has little left to write when a step's end waits for it.
const SYNC_BYTES = 32 << 20

/** The segments in a journal's folder, oldest first; none where there is no such folder. */
export async function listSegments(folder: string): Promise<Segment[]> {
  const names = (await namesIn(folder)).filter((name) => SEGMENT.test(name)).sort()
  return Promise.all(
    names.map(async (name) => {
      const path = join(folder, name)
      return { first: Number(name.slice(0, 12)), path, bytes: (await stat(path)).size }
    }),
  )
}

/** Removes every segment, the newest first: a crash in between leaves steps without a gap. */
export async function clearJournal(folder: string): Promise<void> {
  await makeFolder(folder)
  for (const { path } of (await listSegments(folder)).reverse()) await unlink(path)
  await syncFolder(folder)
}

/**
 * Keeps gradients and the ends of steps. After a crash it has every step that `commit` has resolved for.
 */
export interface Journal {
  /** The bytes of the steps that are in no checkpoint. */
  readonly bytes: number
  /** Whether the gradient of a parameter was appended for the step in progress. */
  holds(parameter: number): boolean
  /** Takes a gradient. Resolves when `payload` may change; only `commit` says whether it was written. */
  append(head: AppliedHead, payload: Uint8Array): Promise<void>
  /**
   * Ends a step in which `parameters` have gradients. Resolves when all of it is kept. Throws STORAGE_FAILED where it
   * cannot be: then nothing of the step in progress is held any more, and the run may append it again.
   */
  commit(end: EndHead, parameters: readonly number[]): Promise<void>
  /** What follows is of step `first` and later ones. */
  rotate(first: number): Promise<void>
  /** The steps up to `step` are in a checkpoint. Steps up to `until`, by default `step`, may be removed. */
  drop(step: number, until?: number): Promise<void>
  close(): Promise<void>
}

/**
 * Writes gradients and the ends of steps to the disk. After a crash a journal has every step that `commit` has resolved
 * for; it may have records of the step in progress as well. A write that fails takes back all records of the step in
 * progress, and the run may append them again.
 */
export class FileJournal implements Journal {
  readonly #folder: string
  readonly #what: string
  #file: FileHandle
  #segments: Segment[]
  #tasks: Task[] = []
  #work: Promise<void> | undefined
  #syncing: Promise<void> | undefined
  #unsynced = 0
  /** The steps up to this one are in a checkpoint. */
  #checkpointed: number
  /** Bytes of the last segment up to the last acknowledged step. */
  #acknowledged = 0
  /** Parameters of the step in progress whose gradients were appended. */
  readonly #held = new Set<number>()
  #failure: unknown

  /** Begins a segment for step `first`, behind the segments of earlier steps. */
  static async open(folder: string, { first, ...rest }: JournalOptions & { first: number }): Promise<FileJournal> {
    await makeFolder(folder)
    const older = (await listSegments(folder)).filter((segment) => segment.first !== first)
    const { file, segment } = await createSegment(folder, first)
    return new FileJournal(folder, { ...rest, file, segments: [...older, segment] })
  }

  private constructor(folder: string, parts: JournalOptions & { file: FileHandle; segments: Segment[] }) {
    this.#folder = folder
    this.#what = parts.what
    this.#checkpointed = parts.checkpointed
    this.#file = parts.file
    this.#segments = parts.segments
  }

  get bytes(): number {
    const open = this.#segments.filter(({ first }) => first > this.#checkpointed)
    return open.reduce((sum, { bytes }) => sum + bytes, 0)
  }

  holds(parameter: number): boolean {
    return this.#held.has(parameter)
  }

  /** Writes a gradient's record. Resolves when `payload` may change; only `commit` says whether it was written. */
  append(head: AppliedHead, payload: Uint8Array): Promise<void> {
    this.#held.add(head.parameter)
    const buffers = [encodeHead(head, payload.length), payload]
    return new Promise((written) => this.#add({ buffers, written }))
  }

  /**
   * Ends a step in which `parameters` have gradients. Resolves when all its records are on the disk. Throws
   * STORAGE_FAILED where they cannot be, and then the journal has none of them.
   */
  async commit(end: EndHead, parameters: readonly number[]): Promise<void> {
    await this.#idle()
    try {
      if (this.#failure) throw this.#failure
      const lost = parameters.filter((parameter) => !this.#held.has(parameter))
      if (lost.length > 0) throw new Error(`the gradients of ${lost.length} parameters have to be sent again`)
      await this.#write([encodeHead(end, 0)])
      await this.#syncing
      /* c8 ignore next -- needs a disk that fails */
      if (this.#failure) throw this.#failure
      await this.#file.datasync()
    } catch (error) {
      await this.#takeBack(error)
      throw new ServiceError(
        'STORAGE_FAILED',
        `${this.#what} cannot be written, step ${end.step} is not finished: ${errorText(error)}`,
        {
          step: end.step,
          retry_after_seconds: 1,
        },
      )
    }
    this.#unsynced = 0
    this.#acknowledged = this.#last.bytes
    this.#held.clear()
  }

  /** Begins a new segment, for step `first` and later ones. */
  rotate(first: number): Promise<void> {
    if (this.#last.first === first) return Promise.resolve()
    return new Promise((rotated, failed) => this.#add({ first, rotated, failed }))
  }

  /**
   * The steps up to `step` are in a checkpoint. Removes the segments whose every step is `until`, by default `step`, or
   * an earlier one.
   */
  async drop(step: number, until = step): Promise<void> {
    this.#checkpointed = step
    const old = this.#segments.filter(
      (_, i) => i + 1 < this.#segments.length && this.#segments[i + 1].first <= until + 1,
    )
    this.#segments = this.#segments.filter((segment) => !old.includes(segment))
    for (const { path } of old) await unlink(path)
  }

  async close(): Promise<void> {
    await this.#idle()
    await Promise.allSettled([this.#syncing])
    await this.#file.close()
  }

  get #last(): Segment {
    return this.#segments[this.#segments.length - 1]
  }

  #add(task: Task): void {
    this.#tasks.push(task)
    this.#work ??= this.#pump().finally(() => {
      this.#work = undefined
    })
  }

  async #idle(): Promise<void> {
    while (this.#work) await this.#work
  }

  async #pump(): Promise<void> {
    for (let task = this.#tasks[0]; task; task = this.#tasks[0]) {
      if ('first' in task) {
        this.#tasks.shift()
        await this.#begin(task)
      } else {
        const end = this.#tasks.findIndex((other, i) => 'first' in other || i === MOST_RECORDS)
        await this.#store(
          this.#tasks.splice(0, end < 0 ? this.#tasks.length : end).filter((other) => 'buffers' in other),
        )
      }
    }
  }

  async #store(batch: readonly Append[]): Promise<void> {
    try {
      if (!this.#failure) {
        await this.#write(batch.flatMap(({ buffers }) => buffers))
        this.#syncAhead()
      }
    } catch (error) {
      this.#failure = error
    }
    for (const { written } of batch) written()
  }

  async #begin({ first, rotated, failed }: Rotate): Promise<void> {
    try {
      const { file, segment } = await createSegment(this.#folder, first)
      await this.#syncing
      await this.#file.close()
      this.#file = file
      this.#segments.push(segment)
      this.#acknowledged = 0
      this.#unsynced = 0
      rotated()
    } catch (error) {
      failed(error)
    }
  }

  async #write(buffers: readonly Uint8Array[]): Promise<void> {
    let rest = buffers
    while (rest.length > 0) {
      const { bytesWritten } = await this.#file.writev([...rest])
      this.#last.bytes += bytesWritten
      this.#unsynced += bytesWritten
      rest = after(rest, bytesWritten)
    }
  }

  #syncAhead(): void {
    if (this.#unsynced < SYNC_BYTES || this.#syncing) return
    this.#unsynced = 0
    this.#syncing = this.#file
      .datasync()
      .catch(
        /* c8 ignore next 3 -- needs a disk that fails */
        (error) => {
          this.#failure = error
        },
      )
      .finally(() => {
        this.#syncing = undefined
      })
  }

  /**
   * Cuts the file behind the last acknowledged step. Where that fails too, nothing more is written until it succeeds.
   */
  async #takeBack(error: unknown): Promise<void> {
    this.#failure = error
    this.#held.clear()
    try {
      await this.#file.truncate(this.#acknowledged)
      await this.#file.datasync()
      this.#last.bytes = this.#acknowledged
      this.#unsynced = 0
      this.#failure = undefined
      /* c8 ignore next 3 -- needs a disk that fails twice */
    } catch (again) {
      this.#failure = again
    }
  }
}

/** What is left of `buffers` behind their first `bytes` bytes. */
function after(buffers: readonly Uint8Array[], bytes: number): Uint8Array[] {
  let skip = bytes
  return buffers.flatMap((buffer) => {
    const skipped = Math.min(skip, buffer.length)
    skip -= skipped
    return skipped === buffer.length ? [] : [buffer.subarray(skipped)]
  })
}

async function createSegment(folder: string, first: number): Promise<{ file: FileHandle; segment: Segment }> {
  const path = join(folder, `${String(first).padStart(12, '0')}.journal`)
  // Appending: after a truncation the next write goes to the new end.
  const file = await open(path, 'a', FILE_MODE)
  try {
    await file.truncate(0)
    await syncFolder(folder)
    return { file, segment: { first, path, bytes: 0 } }
    /* c8 ignore next 4 -- needs a disk that fails */
  } catch (error) {
    await file.close()
    throw error
  }
}
