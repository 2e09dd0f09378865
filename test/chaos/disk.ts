import { execFileSync } from 'node:child_process'
import { closeSync, cpSync, ftruncateSync, mkdirSync, openSync, rmSync, writeSync } from 'node:fs'
import { join } from 'node:path'

const DISK_BYTES = 4 << 20

/** A file system of its own, a few megabytes large. */
export type Disk = {
  path: string
  /** Fills the disk, but for so many bytes. */
  fill: (roomBytes: number) => void
  /** Makes the room again. */
  clear: () => void
  makeReadOnly: () => void
  /** Unmounts the disk; `keep` is a folder that its files are copied to. */
  remove: (keep?: string) => void
}

/** Mounts a tmpfs, which only root may. */
export function mountDisk(path: string): Disk {
  mkdirSync(path, { recursive: true })
  execFileSync('mount', ['-t', 'tmpfs', '-o', `size=${DISK_BYTES}`, 'tmpfs', path], { stdio: 'pipe' })
  const filler = join(path, 'filler')
  return {
    path,
    fill: (roomBytes) => {
      const file = openSync(filler, 'w')
      const size = fillUp(file)
      ftruncateSync(file, Math.max(0, size - roomBytes))
      closeSync(file)
    },
    clear: () => rmSync(filler, { force: true }),
    makeReadOnly: () => {
      execFileSync('mount', ['-o', 'remount,ro', path], { stdio: 'pipe' })
    },
    remove: (keep) => {
      if (keep !== undefined) cpSync(path, keep, { recursive: true })
      execFileSync('umount', [path], { stdio: 'pipe' })
    },
  }
}

/** Why no disk can be mounted here; undefined where one can. */
export function refusalToMount(folder: string): string | undefined {
  try {
    mountDisk(join(folder, 'mount')).remove()
    return undefined
  } catch (error) {
    const text = error instanceof Error && 'stderr' in error ? String(error.stderr) : String(error)
    return text.trim().split('\n')[0]
  }
}

/** Writes until nothing fits any more; returns how many bytes did. */
function fillUp(file: number): number {
  const block = Buffer.alloc(4096, 'x')
  for (let size = 0; ; ) {
    try {
      size += writeSync(file, block)
    } catch (error) {
      if (error instanceof Error && 'code' in error && error.code === 'ENOSPC') return size
      throw error
    }
  }
}
