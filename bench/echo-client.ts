import { once } from 'node:events'
import { connect, type Socket } from 'node:net'

/** The message size of the service's streams. */
const WRITE_BYTES = 4 << 20

export type Echo = {
  /** Sends `bytes` bytes and waits for their return; seconds. */ run(bytes: number): Promise<number>
  close(): void
}

/** A connection to bench/echo. It writes 4 MB at a time and reads into one buffer, to cost as little as possible. */
export async function connectEcho(port: number): Promise<Echo> {
  const reader = { bytes: 0, arrived: () => {} }
  const callback = (count: number) => {
    reader.bytes += count
    reader.arrived()
    return true
  }
  const socket = connect({
    port,
    host: '127.0.0.1',
    noDelay: true,
    onread: { buffer: new Uint8Array(WRITE_BYTES), callback },
  })
  await once(socket, 'connect')
  const block = new Uint8Array(WRITE_BYTES).fill(1)
  const run = async (bytes: number) => {
    const started = performance.now()
    const target = reader.bytes + bytes
    const back = new Promise<void>((resolve) => {
      reader.arrived = () => (reader.bytes === target ? resolve() : undefined)
    })
    for (let left = bytes; left > 0; left -= WRITE_BYTES)
      await write(socket, block.subarray(0, Math.min(left, WRITE_BYTES)))
    await back
    return (performance.now() - started) / 1000
  }
  return { run, close: () => socket.destroy() }
}

async function write(socket: Socket, bytes: Uint8Array): Promise<void> {
  if (!socket.write(bytes)) await once(socket, 'drain')
}
