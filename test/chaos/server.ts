import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { appendFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { manage } from '../../examples/service.js'

/** The service's program. */
export const PROGRAM = fileURLToPath(new URL('../../src/server.js', import.meta.url))
const PRELOAD = new URL('./clock-shift.js', import.meta.url).href

export type ServerOptions = {
  data: string
  flags?: readonly string[]
  /** A file that the server's output is appended to. */
  log: string
  /** The user and group that the service runs as. */
  uid?: number
  /** Variables beside those of this process, of which none is a setting of the service. */
  env?: Readonly<Record<string, string>>
  /** A file that holds the milliseconds by which the wall clock is off; it may change at any time. */
  clock?: string
}

/** How a process ended, and the lines that it wrote to standard error. */
export type Exit = { code: number | null; signal: NodeJS.Signals | null; lines: readonly string[] }

/** The real service in a process of its own. `port` is undefined where it ended before it listened. */
export type Server = {
  pid: number
  port: number | undefined
  exited: Promise<Exit>
  signal(signal: NodeJS.Signals): void
  /** Ends the process with a signal and resolves when it has gone. */
  end(signal: NodeJS.Signals): Promise<Exit>
}

/** Starts the service on a free port and resolves once it listens or has ended. */
export async function startServer(options: ServerOptions): Promise<Server> {
  const { server, listening } = launchServer(options)
  const port = await listening
  return { ...server, port }
}

/** Starts the service; `listening` resolves with its port, or with undefined where it ends before. */
export function launchServer({ data, flags = [], log, uid, clock, env: more }: ServerOptions) {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('MUOND_')))
  const child = spawn(process.execPath, [...preload(clock), PROGRAM, ...DEFAULTS, '--data', data, ...flags], {
    env: { ...env, ...more, ...(clock && { CHAOS_CLOCK: clock }) },
    stdio: ['ignore', 'pipe', 'pipe'],
    ...(uid !== undefined && { uid, gid: uid }),
  })
  const managed = manage(child)
  const heard = listen(child, log)
  const exited = exitOf(child, heard.errors)
  exited.then(managed.stop)
  const server = {
    pid: managed.pid,
    exited,
    signal: (signal: NodeJS.Signals) => void child.kill(signal),
    end: (signal: NodeJS.Signals) => {
      child.kill(signal)
      return exited
    },
  }
  return { server, listening: Promise.race([heard.port, exited.then(() => undefined)]) }
}

/** How a process that loads this program first sees the clock. */
export function preload(clock: string | undefined): string[] {
  return clock === undefined ? [] : ['--import', PRELOAD]
}

// One lane, so that a kill interrupts the same work on every machine.
const DEFAULTS = ['--device', 'cpu', '--port', '0', '--lanes', '1', '--threads', '1', '--staging-bytes', '2097152']

function listen(child: ChildProcess, log: string): { port: Promise<number>; errors: string[] } {
  const errors: string[] = []
  const { stdout, stderr } = child
  const port = new Promise<number>((resolve) => {
    if (stdout) {
      createInterface({ input: stdout }).on('line', (line) => {
        appendFileSync(log, `${line}\n`)
        const [, port] = /"event":"listening","address":"[^"]*:(\d+)"/.exec(line) ?? []
        if (port !== undefined) resolve(Number(port))
      })
    }
  })
  if (stderr) {
    createInterface({ input: stderr }).on('line', (line) => {
      appendFileSync(log, `stderr: ${line}\n`)
      errors.push(line)
    })
  }
  return { port, errors }
}

async function exitOf(child: ChildProcess, lines: readonly string[]): Promise<Exit> {
  // `close` comes after the last byte of the process's output.
  const [code, signal] = await once(child, 'close')
  return { code, signal, lines }
}
