import type { IncomingMessage, Server, ServerResponse } from 'node:http'
import type { Socket } from 'node:net'
import { TLSSocket } from 'node:tls'

/**
 * Lets a server have at most `most` sockets. One more takes the place of that which has waited longest for a request:
 * it has sent none, or none since its last answer. Where every other socket has a request or a stream in progress, the
 * new one is closed. So whoever opens sockets and says nothing keeps nobody out. `refused` hears of each that is
 * closed. With TLS a socket counts from before its handshake.
 */
export function limitSockets(server: Server, most: number, refused: () => void): void {
  /** Requests in progress on each socket: more than one where a client does not wait for answers. */
  const requests = new Map<Socket, number>()
  /** Sockets without one, in the order in which they began to wait. */
  const waiting = new Set<Socket>()
  const below = socketsBelow(server)
  const begin = (upper: Socket) => {
    const socket = below(upper)
    waiting.delete(socket)
    /* c8 ignore next -- one that was closed for another may have a request in what node has read */
    requests.set(socket, (requests.get(socket) ?? 0) + 1)
  }
  const end = (upper: Socket) => {
    const socket = below(upper)
    const count = requests.get(socket)
    if (count === undefined) return
    requests.set(socket, count - 1)
    if (count === 1) waiting.add(socket)
  }
  const enter = (socket: Socket) => {
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
  }
  server.on('connection', enter)
  server.on('secureConnection', (upper: Socket) => {
    // One of a Unix socket has had no handshake, and is new here.
    if (below(upper) === upper) enter(upper)
  })
  server.on('request', ({ socket }: IncomingMessage, response: ServerResponse) => {
    begin(socket)
    response.once('close', () => end(socket))
  })
  server.on('upgrade', ({ socket }: IncomingMessage) => begin(socket))
}

/**
 * Finds the TCP socket below a socket of TLS, which node has no name for: both have the same addresses and ports. Any
 * other socket is itself.
 */
function socketsBelow(server: Server): (upper: Socket) => Socket {
  const sockets = new Map<string, Socket>()
  server.on('connection', (socket: Socket) => {
    const name = nameOf(socket)
    sockets.set(name, socket)
    socket.once('close', () => sockets.delete(name))
  })
  return (upper) => (upper instanceof TLSSocket && sockets.get(nameOf(upper))) || upper
}

function nameOf({ remoteAddress, remotePort, localAddress, localPort }: Socket): string {
  return [remoteAddress, remotePort, localAddress, localPort].join(' ')
}
