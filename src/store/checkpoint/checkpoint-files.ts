import assert from 'node:assert'
import { Worker } from 'node:worker_threads'
import type { ReadRequest, ThreadReply, ThreadRequest, WriteRequest } from './checkpoint-thread.js'
import { type Manifest, UnreadableError } from './manifest.js'

type Waiting = {
  resolve: (manifest: Manifest | undefined) => void
  reject: (error: Error) => void
  written: (position: number) => void
}

/** The thread that writes and reads the files of checkpoints, one checkpoint after the other. */
export class CheckpointFiles {
  readonly #worker: Worker
  readonly #exited: Promise<void>
  readonly #waiting = new Map<number, Waiting>()
  #nextId = 1

  constructor() {
    this.#worker = new Worker(new URL('./checkpoint-thread.js', import.meta.url), { execArgv: [] })
    this.#exited = new Promise((resolve) => this.#worker.once('exit', () => resolve()))
    this.#worker.on('message', (reply: ThreadReply) => this.#receive(reply))
  }

  /**
   * Writes a checkpoint's folder, which is whole after a crash too once this resolves. `written` is called with the
   * position of each tensor, counted over all files, once its memory is not read any more.
   * Rejects with the file system's error; then there is no such checkpoint.
   */
  async write(request: Omit<WriteRequest, 'type' | 'id'>, written: (position: number) => void): Promise<Manifest> {
    const manifest = await this.#ask((id) => ({ ...request, type: 'write', id }), written)
    assert(manifest, 'what was written has a manifest')
    return manifest
  }

  /** Reads a checkpoint's tensors into the memory of `targets`. Rejects with UnreadableError for a damaged file. */
  async read(request: Omit<ReadRequest, 'type' | 'id'>): Promise<void> {
    await this.#ask(
      (id) => ({ ...request, type: 'read', id }),
      () => {},
    )
  }

  /** Ends the thread once it has done all requests. */
  close(): Promise<void> {
    this.#post({ type: 'stop' })
    return this.#exited
  }

  #ask(request: (id: number) => ThreadRequest, written: Waiting['written']): Promise<Manifest | undefined> {
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject, written })
      this.#post(request(id))
    })
  }

  #post(request: ThreadRequest): void {
    this.#worker.postMessage(request)
  }

  #receive(reply: ThreadReply): void {
    const waiting = this.#waiting.get(reply.id)
    if ('written' in reply) return waiting?.written(reply.written)
    this.#waiting.delete(reply.id)
    if ('done' in reply) return waiting?.resolve(reply.done)
    waiting?.reject(reply.unreadable ? new UnreadableError(reply.error) : new Error(reply.error))
  }
}
