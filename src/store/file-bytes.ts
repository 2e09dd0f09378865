import type { FileHandle } from 'node:fs/promises'

const PIECE_BYTES = 4 << 20

/** A file that is open to be read anywhere, wherever it lies: the part of node's FileHandle that reading takes. */
export type OpenFile = {
  stat(): Promise<{ size: number }>
  /** Reads at most `length` bytes from byte `at` on; fewer where the system gives fewer, none behind the end. */
  read<Memory extends Uint8Array>(
    memory: Memory,
    offset: number,
    length: number,
    at: number,
  ): Promise<{ buffer: Memory; bytesRead: number }>
  close(): Promise<void>
}

/** The `length` bytes of a file from byte `at` on; fewer where the file ends before. */
export async function readBytes(file: OpenFile, at: number, length: number): Promise<Buffer> {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, at)
  return buffer.subarray(0, bytesRead)
}

/** The bytes of a file from `begin` to `end`, each piece in memory of its own; fewer where the file ends before. */
export async function* readRange(file: OpenFile, begin: number, end: number): AsyncGenerator<Uint8Array> {
  for (let at = begin; at < end; ) {
    const piece = await readBytes(file, at, Math.min(PIECE_BYTES, end - at))
    if (piece.length === 0) return
    yield piece
    at += piece.length
  }
}

/**
 * A file whose small reads, one behind the other, become few large ones. One read is served after the other.
 */
export function readingAhead(file: OpenFile, most = PIECE_BYTES): OpenFile {
  let start = 0
  let piece: Buffer = Buffer.alloc(0)
  let turn: Promise<unknown> = Promise.resolve()
  const read: OpenFile['read'] = async (memory, offset, length, at) => {
    if (length >= most) return file.read(memory, offset, length, at)
    if (at < start || at + length > start + piece.length) [start, piece] = [at, await readBytes(file, at, most)]
    const found = piece.subarray(at - start, at - start + length)
    memory.set(found, offset)
    return { buffer: memory, bytesRead: found.length }
  }
  return {
    stat: () => file.stat(),
    close: () => file.close(),
    read: (...of) => {
      const next = turn.then(() => read(...of))
      turn = next.catch(() => undefined)
      return next
    },
  }
}

/** Writes all of `bytes` from byte `start` of the file on, by default at its position: a write may take only a part. */
export async function writeAll(file: FileHandle, bytes: Uint8Array, start?: number): Promise<void> {
  const position = (at: number) => (start === undefined ? null : start + at)
  for (let at = 0; at < bytes.length; )
    at += (await file.write(bytes, at, bytes.length - at, position(at))).bytesWritten
}
