import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'

/**
 * A fixed address before a process that may come and go: bytes pass as they are, whatever they are. Closed, it refuses
 * connections and has cut those that there were.
 */
export class Gate {
  readonly origin: string
  /** The port behind it; connections are refused while there is none. */
  target: number | undefined
  readonly #server: Server
  readonly #pairs = new Set<readonly Socket[]>()
  #isOpen = true

  static start(): Promise<Gate> {
    const server = createServer()
    return new Promise((resolve) => {
      server.listen(0, '127.0.0.1', () => resolve(new Gate(server)))
    })
  }

  private constructor(server: Server) {
    this.origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
    this.#server = server
    server.on('connection', (client) => this.#pass(client))
  }

  set isOpen(open: boolean) {
    this.#isOpen = open
    if (!open) this.cut()
  }

  /** Ends every connection at once. */
  cut(): void {
    for (const pair of this.#pairs) for (const socket of pair) socket.destroy()
  }

  close(): Promise<void> {
    const closed = new Promise<void>((resolve) => {
      this.#server.close(() => resolve())
    })
    this.cut()
    return closed
  }

  #pass(client: Socket): void {
    if (this.target === undefined || !this.#isOpen) return void client.destroy()
    const pair = [client, connect(this.target, '127.0.0.1')] as const
    this.#pairs.add(pair)
    for (const [one, other] of [pair, [pair[1], client] as const]) {
      one.pipe(other)
      // A reset is the end of a connection like any other.
      one.on('error', () => {})
      one.once('close', () => {
        other.destroySoon()
        this.#pairs.delete(pair)
      })
    }
  }
}
