import type { IncomingMessage, Server, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'

/**
 * Lets a server have at most `most` sockets. One more takes the place of that which has waited longest for a request:
 * it has sent none, or none since its last answer. Where every other socket has a request or a stream in progress, the
 * new one is closed. So whoever opens sockets and says nothing keeps nobody out. `refused` hears of each that is
 * closed.
 */
export function limitSockets(server: Server, most: number, refused: () => void): void {
  /** Requests in progress on each socket: more than one where a client does not wait for answers. */
  const requests = new Map<Socket, number>()
  /** Sockets without one, in the order in which they began to wait. */
  const waiting = new Set<Socket>()
  const begin = (socket: Socket) => {
    waiting.delete(socket)
    /* c8 ignore next -- one that was closed for another may have a request in what node has read */
    requests.set(socket, (requests.get(socket) ?? 0) + 1)
  }
  const end = (socket: Socket) => {
    const count = requests.get(socket)
    if (count === undefined) return
    requests.set(socket, count - 1)
    if (count === 1) waiting.add(socket)
  }
  server.on('connection', (socket: Socket) => {
    requests.set(socket, 0)
    waiting.add(socket)
    socket.once('close', () => {
      requests.delete(socket)
      waiting.delete(socket)
    })
    const [longest] = waiting
    if (requests.size <= most || longest === undefined) return
    // It counts no more, although its close comes in a later turn.
    requests.delete(longest)
    waiting.delete(longest)
    longest.destroy()
    refused()
  })
  server.on('request', ({ socket }: IncomingMessage, response: ServerResponse) => {
    begin(socket)
    response.once('close', () => end(socket))
  })
  server.on('upgrade', ({ socket }: IncomingMessage) => begin(socket))
}
