import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import { connect as connectTls, createServer as createTlsServer } from 'node:tls'

/** With these the proxy speaks TLS on both sides, so that it knows an answer from a handshake. */
export type ProxyTls = { readonly key: string; readonly cert: string; readonly ca: string }

/** A proxy whose connections a test cuts: the way between a process and what it asks. */
export class CuttableProxy {
  readonly port: number
  readonly #target: number
  readonly #tls: ProxyTls | undefined
  #server: Server
  readonly #sockets = new Set<Socket>()
  #requestsLost = 0
  #answersLost = 0

  static async start(target: number, tls?: ProxyTls): Promise<CuttableProxy> {
    const server = serverOf(tls).listen(0, '127.0.0.1')
    await once(server, 'listening')
    return new CuttableProxy(server, target, tls)
  }

  private constructor(server: Server, target: number, tls: ProxyTls | undefined) {
    this.#target = target
    this.#tls = tls
    this.#server = server
    this.port = (server.address() as AddressInfo).port
    this.#serve()
  }

  /** Ends all connections, and takes no new one. */
  async cut(): Promise<void> {
    const closed = once(this.#server, 'close')
    this.#server.close()
    for (const socket of this.#sockets) socket.destroy()
    await closed
  }

  /** After `cut`, or without it. */
  async close(): Promise<void> {
    if (this.#server.listening) await this.cut()
  }

  async heal(): Promise<void> {
    this.#server = serverOf(this.#tls).listen(this.port, '127.0.0.1')
    await once(this.#server, 'listening')
    this.#serve()
  }

  /** The next connections end before anything of them arrives. */
  loseRequests(connections: number): void {
    this.#requestsLost = connections
  }

  /** The requests of the next connections arrive, and their answers do not. */
  loseAnswers(connections: number): void {
    this.#answersLost = connections
  }

  #serve(): void {
    /* c8 ignore next -- etcd's is without TLS, and its tests run by themselves (test/etcd) */
    this.#server.on(this.#tls ? 'secureConnection' : 'connection', (near: Socket) => {
      if (this.#requestsLost-- > 0) {
        near.destroy()
        return
      }
      const to = { port: this.#target, host: '127.0.0.1' }
      /* c8 ignore next -- the same */
      const far = this.#tls ? connectTls({ ...to, ca: this.#tls.ca }) : connect(to)
      for (const socket of [near, far]) {
        this.#sockets.add(socket)
        // A connection that is cut is what a test wants.
        socket.on('error', () => undefined)
        socket.on('close', () => {
          this.#sockets.delete(socket)
          near.destroy()
          far.destroy()
        })
      }
      near.pipe(far)
      if (this.#answersLost-- > 0) far.once('data', () => near.destroy())
      else far.pipe(near)
    })
  }
}

function serverOf(tls: ProxyTls | undefined): Server {
  /* c8 ignore next -- the same */
  return tls ? createTlsServer(tls) : createServer()
}
