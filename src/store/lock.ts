import { closeSync, ftruncateSync, openSync, readFileSync, writeSync } from 'node:fs'
import { constants, hostname } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import koffi from 'koffi'
import { ConfigError } from '../config.js'
import { errorText } from '../errors.js'
import { FILE_MODE } from './durable.js'

/** What no other process has while this one holds it. */
export type Lock = { release(): void }

const EXCLUSIVE = 2
const WITHOUT_WAITING = 4
const RETRY_MS = 100

/**
 * Locks a folder for this process, and waits at most `wait_seconds` for another process that has it: flock(2) of the
 * file `lock`, whose text names the holder. The kernel unlocks it when the process ends, however it ends. The lock
 * also holds between containers that share the folder. Throws ConfigError with one line that names the holder.
 */
export async function lockFolder(folder: string, wait_seconds: number): Promise<Lock> {
  try {
    return await take(folder, wait_seconds)
  } catch (error) {
    if (error instanceof ConfigError) throw error
    throw new ConfigError(`data folder '${folder}' is not writable: ${errorText(error)}`)
  }
}

/**
 * The folder itself is locked as well as its file `lock`: whoever removes that while a service runs does not let
 * another one in.
 */
async function take(folder: string, wait_seconds: number): Promise<Lock> {
  const file = join(folder, 'lock')
  const deadline = performance.now() + wait_seconds * 1000
  const descriptors: number[] = []
  const release = () => descriptors.forEach(closeSync)
  try {
    const itself = openSync(folder, 'r')
    descriptors.push(itself)
    const said = openSync(file, 'a+', FILE_MODE)
    descriptors.push(said)
    while (!tryLock(itself) || !tryLock(said)) {
      if (performance.now() >= deadline) {
        const holder = readFileSync(said, 'utf8').trim() || 'another process'
        throw new ConfigError(`data folder '${folder}' is in use by ${holder}: one service at a time writes to it`)
      }
      await delay(RETRY_MS)
    }
    ftruncateSync(said)
    writeSync(said, `process ${process.pid} on ${hostname()} since ${new Date().toISOString()}\n`)
  } catch (error) {
    release()
    throw error
  }
  return { release }
}

/** Locks a file, which is made where there is none; undefined where another process holds it. */
export function lockFile(path: string): Lock | undefined {
  const descriptor = openSync(path, 'a+', FILE_MODE)
  if (tryLock(descriptor)) return { release: () => closeSync(descriptor) }
  closeSync(descriptor)
  return undefined
}

/**
 * The process that has locked a folder last, as it names itself, and whether it holds the lock; `unknown` where this
 * process cannot see whether it does.
 */
export type Holder = { readonly text: string; readonly holds: 'yes' | 'no' | 'unknown' }

/** Linux lists the locks of all processes that this one sees, such as `1: FLOCK  ADVISORY  WRITE 12 08:01:34 0 EOF`. */
const KERNEL_LOCKS = '/proc/locks'
const HELD = /^\d+: FLOCK +ADVISORY +WRITE +(\d+) /gm

/** Who has locked a folder, found out without touching the lock; undefined where nobody ever has. */
export function holderOf(folder: string): Holder | undefined {
  const text = textOf(join(folder, 'lock'))?.trim() ?? ''
  const [, pid, host] = /^process (\d+) on (\S+) since /.exec(text) ?? []
  if (pid === undefined) return undefined
  const locks = textOf(KERNEL_LOCKS)
  /* c8 ignore next -- needs another system than Linux */
  if (locks === undefined) return { text, holds: 'unknown' }
  if ([...locks.matchAll(HELD)].some(([, holder]) => holder === pid)) return { text, holds: 'yes' }
  // The list lacks processes of other hosts and containers.
  return { text, holds: host === hostname() ? 'no' : 'unknown' }
}

function textOf(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return undefined
  }
}

let flock: ((descriptor: number, operation: number) => number) | undefined

function tryLock(descriptor: number): boolean {
  flock ??= koffi.load(null).func('flock', 'int', ['int', 'int'])
  if (flock(descriptor, EXCLUSIVE | WITHOUT_WAITING) === 0) return true
  const error = koffi.errno()
  if (error === constants.errno.EWOULDBLOCK) return false
  /* c8 ignore next 2 -- needs a file system without locks */
  throw new ConfigError(`nothing can be locked there: flock failed with error ${error}`)
}
