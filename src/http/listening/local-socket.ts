import { once } from 'node:events'
import { lstatSync, renameSync, type Stats, unlinkSync } from 'node:fs'
import type { Server } from 'node:http'
import { connect, createServer, type Server as SocketServer } from 'node:net'
import { ConfigError } from '../../config.js'
import { errorText } from '../../errors.js'
import { type Lock, lockFile } from '../../store/lock.js'
import { takePlain } from './tls.js'

/** A Unix socket that leads to a server. `close` takes no more connections and removes the file. */
export type LocalSocket = { close(): void }

// Linux has 108 bytes for the path of a socket, with a zero at the end; while it is made ours has four more.
const MOST_PATH_BYTES = 103
/** Only the user that the service runs as may connect. */
const OTHERS_MAY_NOTHING = 0o177

/**
 * Has a server take connections from a Unix socket as well, which only its own user may connect to. The file appears
 * with that mode and in one moment; one that a dead server has left is replaced. A service holds a lock on
 * `<path>.lock`, a file that stays. Throws ConfigError, also where another server is there.
 */
export async function listenLocally(server: Server, path: string): Promise<LocalSocket> {
  try {
    return await listen(server, path)
  } catch (error) {
    if (error instanceof ConfigError) throw error
    throw new ConfigError(`socket '${path}' cannot be made: ${errorText(error)}`)
  }
}

async function listen(server: Server, path: string): Promise<LocalSocket> {
  checkLength(path)
  const lock = lockFile(`${path}.lock`)
  if (lock === undefined) throw new ConfigError(`socket '${path}' is in use: another service listens there`)
  try {
    if ((await whatIsAt(path)) === 'a server')
      throw new ConfigError(`socket '${path}' is in use: another server listens there`)
    const door = createServer((socket) => takePlain(server, socket))
    await bind(door, `${path}.new`)
    renameSync(`${path}.new`, path)
    return opened(door, path, lock)
  } catch (error) {
    lock.release()
    throw error
  }
}

/**
 * What is at the path of a socket. Throws ConfigError where that is a file of another kind, and for a path that is too
 * long.
 */
export async function whatIsAt(
  path: string,
): Promise<'nothing' | 'a server' | 'the socket of a server that has ended'> {
  checkLength(path)
  const found = statOf(path)
  if (found === undefined) return 'nothing'
  if (!found.isSocket()) throw new ConfigError(`socket '${path}' is a file of another kind, which stays`)
  const probe = connect(path)
  const answers = await once(probe, 'connect').then(
    () => true,
    () => false,
  )
  probe.destroy()
  return answers ? 'a server' : 'the socket of a server that has ended'
}

function checkLength(path: string): void {
  const bytes = Buffer.byteLength(path)
  if (bytes > MOST_PATH_BYTES) throw new ConfigError(`socket '${path}' has ${bytes} bytes, at most ${MOST_PATH_BYTES}`)
}

/**
 * Listens at `path`. The file is made before `listen` returns, with the mode that the process has for new files then.
 */
async function bind(door: SocketServer, path: string): Promise<void> {
  if (statOf(path)) unlinkSync(path)
  const before = process.umask(OTHERS_MAY_NOTHING)
  try {
    door.listen(path)
  } finally {
    process.umask(before)
  }
  await once(door, 'listening')
}

function opened(door: SocketServer, path: string, lock: Lock): LocalSocket {
  const own = statOf(path)
  const close = () => {
    door.close()
    // Whoever has put another file there keeps it.
    if (statOf(path)?.ino === own?.ino) unlinkSync(path)
    lock.release()
  }
  return { close }
}

function statOf(path: string): Stats | undefined {
  return lstatSync(path, { throwIfNoEntry: false })
}
