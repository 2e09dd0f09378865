import assert from 'node:assert'
import { setImmediate as turn } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import type { StoreSample } from '../../metrics.js'
import { StoreError } from '../objects/objects.js'
import type {
  ErrorKind,
  ReadRequest,
  ThreadReply,
  ThreadRequest,
  WriteRequest,
  WrittenManifest,
} from './checkpoint-thread.js'
import { type Manifest, UnreadableError } from './manifest.js'
import type { StateEntry } from './state-files.js'

type Waiting = {
  resolve: (manifest: WrittenManifest | undefined) => void
  reject: (error: Error) => void
  written: (entries: number) => void
}

const ERRORS = { unreadable: UnreadableError, store: StoreError, other: Error } satisfies Record<ErrorKind, unknown>

/** What is copied to the thread at a time: so many parameters and tensors take a few milliseconds. */
const ITEMS_PER_TURN = 2048

/** A checkpoint to be written. */
export type Writing = Omit<WriteRequest, 'type' | 'id' | 'manifest'> & {
  manifest: Omit<Manifest, 'files' | 'bytes' | 'momentum_form' | 'dtypes'>
  entries: readonly StateEntry[]
}

/** The thread that writes and reads the files of checkpoints, one checkpoint after the other. */
export class CheckpointFiles {
  readonly #worker: Worker
  readonly #exited: Promise<void>
  readonly #waiting = new Map<number, Waiting>()
  readonly #observe: ((sample: StoreSample) => void) | undefined
  #nextId = 1

  /** `observe` hears of every request to a store of objects. */
  constructor(observe?: (sample: StoreSample) => void) {
    this.#observe = observe
    this.#worker = new Worker(new URL('./checkpoint-thread.js', import.meta.url), { execArgv: [] })
    this.#exited = new Promise((resolve) => this.#worker.once('exit', () => resolve()))
    this.#worker.on('message', (reply: ThreadReply) => this.#receive(reply))
  }

  /**
   * Writes a checkpoint, which is whole after a crash too once this resolves. `written` is told from time to
   * time how many of the entries have memory that is not read any more.
   * Rejects with the file system's error, and with StoreError; then there is no such checkpoint.
   */
  async write({ manifest, entries, ...request }: Writing, written: Waiting['written']): Promise<WrittenManifest> {
    const { parameters, places, ...rest } = manifest
    const id = this.#nextId++
    const most = Math.max(parameters.length, places.length, entries.length)
    for (let at = 0; at < most; at += ITEMS_PER_TURN) {
      if (at > 0) await turn()
      const cut = <T>(list: readonly T[]) => list.slice(at, at + ITEMS_PER_TURN)
      this.#post({ type: 'lists', id, parameters: cut(parameters), places: cut(places), entries: cut(entries) })
    }
    const done = await this.#ask({ ...request, manifest: rest, type: 'write', id }, written)
    assert(done, 'what was written has a manifest')
    return done
  }

  /** Reads a checkpoint's tensors into the memory of `targets`. Rejects with UnreadableError for a damaged file. */
  async read(request: Omit<ReadRequest, 'type' | 'id'>): Promise<void> {
    await this.#ask({ ...request, type: 'read', id: this.#nextId++ }, () => {})
  }

  /** Ends the thread once it has done all requests. */
  close(): Promise<void> {
    this.#post({ type: 'stop' })
    return this.#exited
  }

  #ask(request: WriteRequest | ReadRequest, written: Waiting['written']): Promise<WrittenManifest | undefined> {
    return new Promise((resolve, reject) => {
      this.#waiting.set(request.id, { resolve, reject, written })
      this.#post(request)
    })
  }

  #post(request: ThreadRequest): void {
    this.#worker.postMessage(request)
  }

  #receive(reply: ThreadReply): void {
    if ('sample' in reply) return this.#observe?.(reply.sample)
    const waiting = this.#waiting.get(reply.id)
    if ('written' in reply) return waiting?.written(reply.written)
    this.#waiting.delete(reply.id)
    if ('done' in reply) return waiting?.resolve(reply.done)
    waiting?.reject(new ERRORS[reply.kind](reply.error))
  }
}
