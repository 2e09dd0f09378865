import { fork } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { type Child, type LogEntry, manage, startService as startProcess } from '../examples/service.js'

/** Bytes of memory that a process has resident: now, and at most since it started. */
export type Memory = { now: number; peak: number }

const PROGRAM = fileURLToPath(new URL('../src/server.js', import.meta.url))

// /proc counts CPU time in units of 1/USER_HZ seconds; USER_HZ is 100 on every Linux that Node 20 runs on.
const TICKS_PER_SECOND = 100

/** Starts the service as in real use: a process of its own, a free port, the CPU, and the defaults but for `flags`. */
export async function startService(
  flags: readonly string[] = [],
  log?: (entry: LogEntry) => void,
): Promise<Child & { url: URL }> {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('MUOND_')))
  const service = await startProcess(PROGRAM, { args: ['--device', 'cpu', ...flags], env, log })
  return { ...service, url: new URL('/v1/stream', service.url.replace('http', 'ws')) }
}

/** Starts `dist/bench/<name>.js`; `ask` sends it one message and waits for its answer. */
export async function startProgram(name: string, args: readonly string[] = []) {
  const child = fork(fileURLToPath(new URL(`./${name}.js`, import.meta.url)), args)
  const managed = manage(child)
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
  return { ...managed, answer, ask }
}

/** CPU seconds, user and system, that all threads of a process have used. Source: proc(5), /proc/pid/stat. */
export function cpuSeconds(pid: number): number {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
  // The command's name in brackets may hold blanks; utime and stime are the 14th and 15th field.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND
}

/** Begins the measurement of a process's peak memory anew. Source: proc(5), clear_refs. */
export function resetPeak(pid: number): void {
  writeFileSync(`/proc/${pid}/clear_refs`, '5')
}

export function memory(pid: number): Memory {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  const bytes = (field: string) => 1024 * Number(new RegExp(`^${field}:\\s+(\\d+) kB`, 'm').exec(status)?.[1])
  return { now: bytes('VmRSS'), peak: bytes('VmHWM') }
}
