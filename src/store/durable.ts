import { mkdir, open, readdir, rename, stat } from 'node:fs/promises'
import { dirname } from 'node:path'

/** State is nobody's but the service's: another user of the machine neither reads nor changes it. */
export const FILE_MODE = 0o600
const FOLDER_MODE = 0o700

/** Makes a folder and those above it that are lacking. Throws where it cannot be made or the path is of no folder. */
export async function makeFolder(path: string): Promise<void> {
  try {
    await makeOne(path)
  } catch (error) {
    if (!hasCode(error, 'ENOENT')) throw error
    // The option `recursive` of node tries for ever where a folder that exists lets none be made in it, as /proc does.
    await makeFolder(dirname(path))
    await makeOne(path)
  }
}

/** Makes a folder in one that is there, unless somebody has made it. */
async function makeOne(path: string): Promise<void> {
  try {
    await mkdir(path, FOLDER_MODE)
  } catch (error) {
    if (!hasCode(error, 'EEXIST') || !(await stat(path)).isDirectory()) throw error
  }
}

/** Writes the whole of a file so that after a crash it has either its old text or this one. */
export async function replaceFile(path: string, text: string): Promise<void> {
  const fresh = `${path}.new`
  const file = await open(fresh, 'w', FILE_MODE)
  try {
    await file.writeFile(text)
    await file.sync()
  } finally {
    await file.close()
  }
  await rename(fresh, path)
  await syncFolder(dirname(path))
}

/** Writes a folder's entries to the disk: a file made, renamed or removed in it is so after a crash only then. */
export async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder, 'r')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

/** The names in a folder; none where there is no such folder. */
export async function namesIn(folder: string): Promise<string[]> {
  try {
    return await readdir(folder)
  } catch (error) {
    if (hasCode(error, 'ENOENT')) return []
    throw error
  }
}

export function hasCode(error: unknown, code: string): boolean {
  return error instanceof Error && 'code' in error && error.code === code
}
