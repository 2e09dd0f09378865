import { type FileHandle, open, rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { FILE_MODE, makeFolder, replaceFile, syncFolder } from '../durable.js'
import { writeAll } from '../file-bytes.js'
import { type CheckpointPlace, type FileSink, MANIFEST } from './checkpoint-place.js'

// A sync after so many bytes: one for a whole checkpoint would stall every other sync of the disk, the journal's too.
const SYNC_BYTES = 64 << 20

/** A checkpoint in a folder of its own. */
export function checkpointFolder(folder: string): CheckpointPlace {
  return {
    name: folder,
    begin: async () => {
      await makeFolder(folder)
      await syncFolder(dirname(folder))
    },
    create: async (file) => new DiskFile(await open(join(folder, file), 'w', FILE_MODE)),
    finish: async (manifest) => {
      await syncFolder(folder)
      await replaceFile(join(folder, MANIFEST), manifest)
    },
    // The manifest first: a folder without one is no checkpoint, whatever a crash leaves in it.
    discard: async () => {
      await rm(join(folder, MANIFEST), { force: true })
      await rm(folder, { recursive: true })
    },
    open: (file) => open(join(folder, file), 'r'),
  }
}

class DiskFile implements FileSink {
  readonly #handle: FileHandle
  #unsynced = 0

  constructor(handle: FileHandle) {
    this.#handle = handle
  }

  async write(bytes: Uint8Array): Promise<void> {
    await writeAll(this.#handle, bytes)
    this.#unsynced += bytes.length
    if (this.#unsynced < SYNC_BYTES) return
    this.#unsynced = 0
    await this.#handle.datasync()
  }

  end(): Promise<void> {
    return this.#handle.sync()
  }

  close(): Promise<void> {
    return this.#handle.close()
  }
}
