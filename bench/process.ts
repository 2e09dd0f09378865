import { type ChildProcess, fork, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { fileURLToPath } from 'node:url'

/** Another process of the benchmark; `stop` ends it and waits until it has gone. */
export type Measured = { pid: number; stop: () => Promise<void> }

/** Bytes of memory that a process has resident: now, and at most since it started. */
export type Memory = { now: number; peak: number }

const PROGRAM = fileURLToPath(new URL('../src/server.js', import.meta.url))

// What /proc counts in: USER_HZ, 100 on every Linux that Node 20 runs on.
const TICKS_PER_SECOND = 100

/** Starts the service as in real use: its own process, a free port, the CPU device, the defaults unless `flags` say otherwise. */
export async function startService(flags: readonly string[] = []): Promise<Measured & { url: URL }> {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('MUOND_')))
  const args = [PROGRAM, '--port', '0', '--device', 'cpu', ...flags]
  const child = spawn(process.execPath, args, { env, stdio: ['ignore', 'pipe', 'inherit'] })
  const measured = measure(child)
  const url = new URL('/v1/stream', (await addressIn(child.stdout)).replace('http', 'ws'))
  return { ...measured, url }
}

/** Starts `dist/bench/<name>.js`; `ask` sends it one message and waits for its answer. */
export async function startProgram(name: string, args: readonly string[] = []) {
  const child = fork(fileURLToPath(new URL(`./${name}.js`, import.meta.url)), args)
  const measured = measure(child)
  const ended = once(child, 'exit').then(([code]) => new Error(`bench/${name} ended with ${code} before it answered`))
  const answer = async (): Promise<unknown> => {
    const message = once(child, 'message').then(([first]) => first)
    const first = await Promise.race([message, ended])
    if (first instanceof Error) throw first
    return first
  }
  const ask = (message: string): Promise<unknown> => {
    child.send(message)
    return answer()
  }
  return { ...measured, answer, ask }
}

/** CPU seconds, user and system, that all threads of a process have used. Source: proc(5), /proc/pid/stat. */
export function cpuSeconds(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
  // The command's name in brackets may hold blanks; utime and stime are the 14th and 15th field.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND
}

export function memory(pid: number): Memory {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  const bytes = (field: string) => 1024 * Number(new RegExp(`^${field}:\\s+(\\d+) kB`, 'm').exec(status)?.[1])
  return { now: bytes('VmRSS'), peak: bytes('VmHWM') }
}

function measure(child: ChildProcess): Measured {
  const { pid } = child
  if (pid === undefined) throw new Error(`${child.spawnfile} did not start`)
  const ended = once(child, 'exit')
  const orphaned = () => child.kill()
  process.once('exit', orphaned)
  const stop = async () => {
    process.off('exit', orphaned)
    child.kill()
    await ended
  }
  return { pid, stop }
}

/** The address in the service's first log line that has one; what it logs later is dropped, so that the pipe never fills. */
async function addressIn(log: Readable): Promise<string> {
  for await (const line of createInterface({ input: log })) {
    const { address } = JSON.parse(line)
    if (typeof address !== 'string') continue
    log.resume()
    return address
  }
  throw new Error('the service ended before it was ready')
}
