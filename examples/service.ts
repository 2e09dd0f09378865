import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'

/** A child process: `stop` ends it and waits until it has gone. It does not outlive this process. */
export type Child = { pid: number; stop: () => Promise<void> }

/** A running service: `url` is where it listens. */
export type Service = Child & { url: string }

const SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

export type LogEntry = { event?: string; address?: string; [field: string]: unknown }
export type ServiceOptions = {
  args?: readonly string[]
  env?: NodeJS.ProcessEnv
  ready_seconds?: number
  /** Called with every piece of the service's log. */
  log?: (entry: LogEntry) => void
}

/**
 * Starts the service `program` as a process of its own, as in real use, on a free port.
 * @throws if the service ends, or takes too long, before it says where it listens. Its own words are on standard error.
 */
export async function startService(program: string, options: ServiceOptions = {}): Promise<Service> {
  const { args = [], env = process.env, ready_seconds = 60, log } = options
  const child = spawn(process.execPath, [program, '--port', '0', ...args], {
    env,
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const managed = manage(child)
  const late = setTimeout(() => child.kill(), ready_seconds * 1000)
  const url = await addressIn(child.stdout, log).finally(() => clearTimeout(late))
  if (url === undefined) throw new Error(`the service ended before it was ready, or was not within ${ready_seconds} s`)
  return { ...managed, url }
}

export function manage(child: ChildProcess): Child {
  const ended = once(child, 'exit')
  const orphaned = () => child.kill()
  // A signal ends a process without its exit event: the handler ends the child and then sends the signal again.
  const signalled = (signal: NodeJS.Signals) => {
    child.kill()
    process.kill(process.pid, signal)
  }
  process.once('exit', orphaned)
  for (const signal of SIGNALS) process.once(signal, signalled)
  const stop = async () => {
    process.off('exit', orphaned)
    for (const signal of SIGNALS) process.off(signal, signalled)
    child.kill()
    await ended
  }
  return { pid: Number(child.pid), stop }
}

/** The address in the first log line that has one. Later lines are read too, so that the pipe never fills. */
function addressIn(log: Readable, tell: (entry: LogEntry) => void = () => {}): Promise<string | undefined> {
  const lines = createInterface({ input: log })
  return new Promise((resolve) => {
    lines.on('line', (line) => {
      const entry: LogEntry = JSON.parse(line)
      tell(entry)
      if (entry.address !== undefined) resolve(entry.address)
    })
    lines.once('close', () => resolve(undefined))
  })
}
