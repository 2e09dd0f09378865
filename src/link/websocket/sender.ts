import type { Duplex } from 'node:stream'
import type { WebSocket } from 'ws'
import { Queue } from '../../device/lanes/queue.js'

/**
 * One message: a header alone, or a header followed by a payload that is sent from where it lies. A payload that has to
 * be put together is made when its turn has come.
 */
export type Message = { header: Buffer; payload?: Uint8Array | (() => Uint8Array) }

type Item = Message & { resolve: (sent: boolean) => void }

// Enough to keep the socket busy; everything beyond waits here, where it can still be dropped.
const WINDOW_BYTES = 8 << 20

/** The order and the flow of what one connection is sent: at most WINDOW_BYTES lie in the socket at a time. */
export class Sender {
  #busySince = 0
  readonly #socket: WebSocket
  readonly #waiting = new Queue<Item>()
  #inSocket = 0
  /** Messages in the socket. Node calls back for each of them, also when the connection is lost. */
  #flying = 0
  #gathers = false

  constructor(socket: WebSocket) {
    this.#socket = socket
    socket.once('close', () => this.drop())
  }

  get busy(): boolean {
    return this.#flying > 0 || this.#waiting.length > 0
  }

  /** Since when something waits to leave or to be handed to the kernel; undefined where nothing does. */
  get busySince(): number | undefined {
    return this.busy ? this.#busySince : undefined
  }

  /**
   * Resolves true when the message was handed to the kernel whole, false when it was dropped. A header alone is small
   * and does not wait for the window: an error must reach the socket before the close that follows it.
   */
  send(message: Message): Promise<boolean> {
    if (!this.busy) this.#busySince = performance.now()
    return new Promise((resolve) => {
      const item = { ...message, resolve }
      if (message.payload === undefined && this.#open) return this.#write(item)
      this.#waiting.push(item)
      this.#flush()
    })
  }

  /** Drops what is not in the socket yet. */
  drop(): void {
    for (const item of this.#waiting.drain()) item.resolve(false)
  }

  get #open(): boolean {
    return this.#socket.readyState === this.#socket.OPEN
  }

  #flush(): void {
    if (!this.#open) return this.drop()
    while (this.#inSocket < WINDOW_BYTES) {
      const item = this.#waiting.shift()
      if (item === undefined) return
      this.#write(item)
    }
  }

  #write(item: Item): void {
    const payload = typeof item.payload === 'function' ? item.payload() : item.payload
    const bytes = item.header.length + (payload?.length ?? 0)
    this.#inSocket += bytes
    this.#flying += 1
    const done = (error?: Error | null) => {
      this.#inSocket -= bytes
      this.#flying -= 1
      item.resolve(!error)
      this.#flush()
    }
    if (payload === undefined) return this.#socket.send(item.header, { binary: true }, done)
    this.#gather()
    this.#socket.send(item.header, { binary: true, fin: false })
    this.#socket.send(payload, { binary: true, fin: true }, done)
  }

  /** Has all that is written in this turn of the event loop leave in one system call. */
  #gather(): void {
    if (this.#gathers) return
    this.#gathers = true
    // ws has no cork of its own, and @types/ws leaves the stream below out.
    const stream: Duplex = Reflect.get(this.#socket, '_socket')
    stream.cork()
    setImmediate(() => {
      this.#gathers = false
      stream.uncork()
    })
  }
}
