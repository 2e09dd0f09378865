import { type AddressInfo, connect, createServer, type Server, type Socket } from 'node:net'
import { type Frame, FrameSplitter, isControl, type Label, labelOf, type Piece } from './frames.js'

/** `up` is towards the service, `down` towards the client. */
export type Direction = 'up' | 'down'

/** A frame that passes the proxy; `label` is its message's. */
export type Passing = { frame: Frame; label: Label | undefined; direction: Direction; link: Link }

/** Returns the bytes that go on in place of a frame. Later frames of its direction wait for the answer. */
export type Meddle = (passing: Passing) => Buffer[] | Promise<Buffer[]>

const asItIs: Meddle = ({ frame }) => [frame.bytes]

/**
 * A TCP proxy for a service that may come and go. It cuts each connection into frames and gives `meddle` each of
 * them.
 */
export class FrameProxy {
  readonly url: string
  /** The service's port; connections are refused while there is none. */
  target: number | undefined
  meddle: Meddle = asItIs
  readonly #server: Server
  readonly #links = new Set<Link>()
  #connections = 0

  static start(): Promise<FrameProxy> {
    const server = createServer()
    return new Promise((resolve) => {
      server.listen(0, '127.0.0.1', () => resolve(new FrameProxy(server)))
    })
  }

  private constructor(server: Server) {
    const { port } = server.address() as AddressInfo
    this.url = `ws://127.0.0.1:${port}`
    this.#server = server
    server.on('connection', (client) => this.#link(client))
  }

  /** How many connections there have been. */
  get connections(): number {
    return this.#connections
  }

  /** Lets everything pass again. */
  rest(): void {
    this.meddle = asItIs
  }

  /** Ends every connection at once. */
  cut(): void {
    for (const link of this.#links) link.cut()
  }

  close(): Promise<void> {
    const closed = new Promise<void>((resolve) => {
      this.#server.close(() => resolve())
    })
    this.cut()
    return closed
  }

  #link(client: Socket): void {
    if (this.target === undefined) return void client.destroy()
    const link = new Link(client, connect(this.target, '127.0.0.1'), {
      number: ++this.#connections,
      meddle: (passing) => this.meddle(passing),
    })
    this.#links.add(link)
    link.closed.then(() => this.#links.delete(link))
  }
}

/** One connection through the proxy. */
export class Link {
  /** Counted from 1. */
  readonly number: number
  /** Resolves when all received bytes were passed on and both ends are gone. */
  readonly closed: Promise<unknown>
  readonly #client: Socket
  readonly #service: Socket
  #silence: NodeJS.Timeout | undefined
  #silenceMs = 0

  constructor(client: Socket, service: Socket, { number, meddle }: { number: number; meddle: Meddle }) {
    this.number = number
    this.#client = client
    this.#service = service
    this.closed = Promise.all([this.#relay('up', meddle), this.#relay('down', meddle)])
  }

  cut(): void {
    clearTimeout(this.#silence)
    this.#client.destroy()
    this.#service.destroy()
  }

  /** From now on the connection is cut once no frame has come for so long: both ends may wait for a swallowed frame. */
  cutWhenSilent(milliseconds: number): void {
    this.#silenceMs = milliseconds
    this.#heard()
  }

  /** Resolves when the kernel has the bytes, or the connection is gone. */
  write(direction: Direction, bytes: Uint8Array): Promise<void> {
    const to = direction === 'up' ? this.#service : this.#client
    return new Promise((resolve) => {
      to.write(bytes, () => resolve())
    })
  }

  async #relay(direction: Direction, meddle: Meddle): Promise<void> {
    const [from, to] = direction === 'up' ? [this.#client, this.#service] : [this.#service, this.#client]
    const splitter = new FrameSplitter()
    const labels = new Labels()
    let turn = Promise.resolve()
    const pass = async (piece: Piece) => {
      const passed =
        piece.kind === 'head'
          ? [piece.bytes]
          : await meddle({ frame: piece, label: labels.of(piece), direction, link: this })
      for (const bytes of passed) to.write(bytes)
    }
    from.on('data', (bytes) => {
      this.#heard()
      for (const piece of splitter.push(bytes)) turn = turn.then(() => pass(piece))
    })
    const ended = new Promise<void>((resolve) => from.once('close', () => resolve()))
    // A reset is the end of a connection like any other.
    from.on('error', () => {})
    await ended
    await turn
    to.end(splitter.rest)
    to.destroySoon()
  }

  #heard(): void {
    clearTimeout(this.#silence)
    if (this.#silenceMs > 0 && !this.#client.destroyed) this.#silence = setTimeout(() => this.cut(), this.#silenceMs)
  }
}

/** The label of each frame's message: only its first frame says what it is. */
class Labels {
  #current: Label | undefined

  of(frame: Frame): Label | undefined {
    if (isControl(frame)) return undefined
    if (frame.opcode !== 0) this.#current = labelOf(frame.payload)
    return this.#current
  }
}
