import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'

/** A running service: `url` is where it listens, `stop` ends it and waits until it has gone. */
export type Service = { url: string; stop: () => Promise<void> }

/**
 * Starts the service `program` as a process of its own, as in real use, on a free port.
 * @throws if it ends before it says where it listens; what it had to say about that is on standard error.
 */
export async function startService(program: string): Promise<Service> {
  const child = spawn(process.execPath, [program, '--port', '0'], { stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = once(child, 'exit')
  const orphaned = () => child.kill()
  process.once('exit', orphaned)
  const url = await addressIn(child.stdout)
  const stop = async () => {
    process.off('exit', orphaned)
    child.kill()
    await ended
  }
  return { url, stop }
}

/** The address in the first log line that has one. Lines after it are read and dropped, so that the pipe never fills. */
async function addressIn(log: Readable): Promise<string> {
  for await (const line of createInterface({ input: log })) {
    const { address } = JSON.parse(line)
    if (typeof address !== 'string') continue
    log.resume()
    return address
  }
  throw new Error('the service ended before it was ready')
}
