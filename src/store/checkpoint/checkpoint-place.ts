import type { OpenFile } from '../file-bytes.js'
import type { ObjectsAddress } from '../objects/open-objects.js'

/** The name of the file that makes the others of a checkpoint count. */
export const MANIFEST = 'manifest.json'

/** Where a checkpoint is, as plain data, which another thread can be sent. */
export type CheckpointAddress =
  | { readonly kind: 'folder'; readonly folder: string }
  | { readonly kind: 'objects'; readonly objects: ObjectsAddress; readonly folder: string }

/** A file of a checkpoint that is being written, from front to back. */
export type FileSink = {
  /** Takes bytes, which may change once this resolves. */
  write(bytes: Uint8Array): Promise<void>
  /** All bytes were given: the file survives a crash once this resolves. */
  end(): Promise<void>
  /** Lets go of a file, whole or not. */
  close(): Promise<void>
}

/** Where the files of one checkpoint are written and read: a folder, or objects. */
export type CheckpointPlace = {
  /** For messages. */
  readonly name: string
  begin(): Promise<void>
  /** Begins a file that will have `bytes` bytes. */
  create(file: string, bytes: number): Promise<FileSink>
  /** Writes the manifest, once every other file is whole; nothing of the checkpoint counts before. */
  finish(manifest: string): Promise<void>
  /** Removes everything that was written. */
  discard(): Promise<void>
  open(file: string): Promise<OpenFile>
}
