import type { ObjectsAddress } from './open-objects.js'

/** What an object's content is called by its store: a write changes it. */
export type Version = string

export type StoredObject = { readonly bytes: Buffer; readonly version: Version }

/** An object that is being written from front to back. It is not there before `end` resolves. */
export type Upload = {
  /** Takes bytes, which may change once this resolves. */
  write(bytes: Uint8Array): Promise<void>
  /** All bytes were given: resolves when the object is there, in the place of an older one. */
  end(): Promise<void>
  /** Removes what was uploaded. Does nothing once `end` has resolved. */
  abort(): Promise<void>
}

/** An upload that somebody has begun and not ended. */
export type Unfinished = { readonly key: string; readonly id: string }

/**
 * Objects by their keys, `a/b/c`. What is written is there for every reader, and after a crash too, once a call
 * resolves. A call throws StoreError where the store does not answer or refuses; a write may have happened then all
 * the same.
 *
 * Conditional writes are what keeps two writers apart: of all who write on the same condition exactly one does
 * (`probe` finds out). Bytes of a conditional write must be of one writer alone: where an answer was lost and the write
 * is tried again, these bytes in the object are what tells the writer that it was the one.
 */
export type Objects = {
  /** For messages and logs. */
  readonly name: string
  get(key: string): Promise<StoredObject | undefined>
  /** The bytes of an object; undefined where there is none. */
  size(key: string): Promise<number | undefined>
  /** Fills `memory` with the bytes of an object from byte `at` on, which must be there. */
  readInto(memory: Uint8Array, key: string, at: number): Promise<void>
  put(key: string, bytes: Uint8Array): Promise<void>
  /** Makes an object; undefined where there is one already. */
  putIfAbsent(key: string, bytes: Uint8Array): Promise<Version | undefined>
  /** Writes an object anew; undefined where it is not of this version any more. */
  putIfUnchanged(key: string, bytes: Uint8Array, version: Version): Promise<Version | undefined>
  /** The keys that begin with `prefix`, in their order; with `after` only those behind that. */
  list(prefix: string, after?: string): AsyncIterable<string>
  /**
   * Makes an object `to` that has the bytes of the object `from` of another place in the same store, which they do not
   * leave. Answers whether there is such an object.
   */
  copyFrom(place: ObjectsAddress, from: string, to: string): Promise<boolean>
  /** Removes objects; one that is not there is gone already. */
  delete(keys: readonly string[]): Promise<void>
  /** Begins an object of `bytes` bytes. */
  upload(key: string, bytes: number): Upload
  unfinished(prefix: string): AsyncIterable<Unfinished>
  abort(upload: Unfinished): Promise<void>
}

/** A store does not answer, or refuses. The message names the store, the object and what it has said. */
export class StoreError extends Error {
  override readonly name = 'StoreError'
}
