import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import { type App, buildApp } from '../../src/app.js'
import type { ConnectOptions } from '../../src/client/client.js'
import { configOf, type SettingName } from '../../src/config.js'

/** Makes a client wait only milliseconds between its attempts. */
export const QUICK: ConnectOptions = { transport: 'websocket', backoff: { first_seconds: 0.001, most_seconds: 0.01 } }

export type Service = App & { url: string; port: number }

/** The real service on the CPU device and a free port. */
export async function startService(settings: Partial<Record<SettingName, string | number>> = {}): Promise<Service> {
  const config = configOf({ device: 'cpu', lanes: 1, threads: 1, port: 0, ...settings })
  const service = await buildApp({ config })
  await service.app.listen({ host: '127.0.0.1', port: 0 })
  const { port } = service.app.server.address() as AddressInfo
  return { ...service, port, url: `ws://127.0.0.1:${port}` }
}

export type Proxy = { url: string; connections: () => number; cut: () => void; close: () => Promise<void> }

/**
 * A TCP proxy that cuts its n-th connection dead after `budgets[n]` bytes, counted over both directions; connections
 * beyond the list live on. It listens on port `at`, 0 for a free one. `cut` ends the open connections.
 */
export async function startProxy(port: number, budgets: readonly number[] = [], at = 0): Promise<Proxy> {
  const sockets = new Set<Socket>()
  let connections = 0
  const server = createServer((client) => {
    let left = budgets[connections++] ?? Infinity
    const service = connect(port, '127.0.0.1')
    const both = [client, service]
    const destroy = () => both.map((socket) => socket.destroy())
    const relay = (to: Socket) => (bytes: Buffer) => {
      to.write(bytes.subarray(0, left))
      left -= bytes.length
      if (left <= 0) destroy()
    }
    client.on('data', relay(service))
    service.on('data', relay(client))
    for (const socket of both) {
      sockets.add(socket)
      socket.on('error', destroy)
      socket.on('close', () => {
        sockets.delete(socket)
        destroy()
      })
    }
  })
  const cut = () => [...sockets].map((socket) => socket.destroy())
  return {
    url: `ws://127.0.0.1:${await listen(server, at)}`,
    connections: () => connections,
    cut,
    close: () => close(server, cut),
  }
}

export function listen(server: Server, port = 0): Promise<number> {
  return new Promise((resolve) => {
    server.listen(port, '127.0.0.1', () => resolve((server.address() as AddressInfo).port))
  })
}

function close(server: Server, cut: () => void): Promise<void> {
  return new Promise((resolve) => {
    server.close(() => resolve())
    cut()
  })
}
