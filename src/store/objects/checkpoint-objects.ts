import { type CheckpointPlace, type FileSink, MANIFEST } from '../checkpoint/checkpoint-place.js'
import type { OpenFile } from '../file-bytes.js'
import { type Objects, StoreError, type Upload } from './objects.js'

/** A checkpoint whose files are objects: `folder` and `/` come before their names. */
export function checkpointObjects(objects: Objects, folder: string): CheckpointPlace {
  const keyOf = (file: string) => `${folder}/${file}`
  return {
    name: `${objects.name}/${folder}`,
    begin: async () => {},
    create: async (file, bytes) => new ObjectSink(objects.upload(keyOf(file), bytes)),
    finish: (manifest) => objects.put(keyOf(MANIFEST), Buffer.from(manifest)),
    discard: () => removeAll(objects, `${folder}/`),
    open: (file) => openObject(objects, keyOf(file)),
  }
}

/** Removes all objects whose keys begin with a prefix. */
export async function removeAll(objects: Objects, prefix: string): Promise<void> {
  const keys: string[] = []
  for await (const key of objects.list(prefix)) keys.push(key)
  await objects.delete(keys)
}

class ObjectSink implements FileSink {
  readonly #upload: Upload

  constructor(upload: Upload) {
    this.#upload = upload
  }

  write(bytes: Uint8Array): Promise<void> {
    return this.#upload.write(bytes)
  }

  end(): Promise<void> {
    return this.#upload.end()
  }

  /** What cannot be removed now is removed when the run is taken again. */
  close(): Promise<void> {
    return this.#upload.abort().catch(() => undefined)
  }
}

/** An object to be read anywhere. Throws StoreError where there is none. */
export async function openObject(objects: Objects, key: string): Promise<OpenFile> {
  const size = await objects.size(key)
  if (size === undefined) throw new NoObjectError(`there is no object ${key}`)
  return {
    stat: async () => ({ size }),
    read: async (buffer, offset, length, at) => {
      const bytesRead = Math.max(0, Math.min(length, size - at))
      if (bytesRead > 0) await objects.readInto(buffer.subarray(offset, offset + bytesRead), key, at)
      return { buffer, bytesRead }
    },
    close: async () => {},
  }
}

/** An object is not there, as opposed to a store that does not answer. */
export class NoObjectError extends StoreError {}
