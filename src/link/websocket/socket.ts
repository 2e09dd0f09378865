import assert from 'node:assert'
import { createRequire } from 'node:module'
import { Socket } from 'node:net'
import type { Duplex } from 'node:stream'
import { WebSocket } from 'ws'
import type { GradientHead } from '../../wire/codec.js'
import { FrameReader } from './frame-reader.js'

/** Where gradients go that are received in place. */
export type GradientSink = {
  /**
   * `dataLength` bytes of memory for this gradient chunk, or undefined: the frame then arrives as an ordinary message.
   * That answer is always right, and needed while an earlier message waits to be handled. The memory must stay until
   * `received`, `abandon`, `redirect`, `close` or `terminate`.
   */
  destination(head: GradientHead): Uint8Array | undefined
  /** The chunk is complete in its destination. In order with the messages around it. */
  received(head: GradientHead): void
}

type SocketOptions = { allowSynchronousEvents: boolean; maxPayload: number }
type SetSocket = (this: WebSocket, socket: Duplex, head: Buffer, options: SocketOptions) => void
type ReadHooks = { buffer: symbol; callback: symbol; generator: symbol }

// The method in which ws takes over a socket; @types/ws leaves it out.
const takeSocket: SetSocket = Reflect.get(WebSocket.prototype, 'setSocket')

const { unmask }: { unmask: (bytes: Uint8Array, key: Uint8Array) => void } = createRequire(import.meta.url)(
  'bufferutil',
)

/**
 * A server's WebSocket (`options.WebSocket` of @fastify/websocket) that lets the kernel write the payload of large
 * gradient frames straight into the memory that `sink` names: 0.2–0.35 CPU seconds per GB instead of 1.3–1.8.
 * Everything else goes through ws as ever. It stands on what `net.Socket` does for its `onread` option; where any of
 * that is missing, with TLS or with compression, `inPlace` is false and all frames are ordinary messages.
 */
export class InPlaceWebSocket extends WebSocket {
  sink: GradientSink | undefined
  /** Told of a ping or pong of `bytes` bytes that needs no answer, and has no event. */
  skipped: (bytes: number) => void = () => {}
  /** Told of a fragment of a message that is small. */
  /* c8 ignore next -- a session has its own before anything is read */
  small: () => void = () => {}
  /** Whether an ordinary message of so many bytes may be read now; otherwise its socket is paused until it may. */
  admit: (bytes: number) => boolean = () => true
  #reader: FrameReader | undefined
  /** What has come before the upgrade was answered, and was not read yet. */
  #early: Uint8Array = Buffer.alloc(0)
  #useBuffer: ((buffer: Uint8Array) => void) | undefined

  get inPlace(): boolean {
    return this.#reader !== undefined
  }

  /** Called by ws at the end of the upgrade. */
  setSocket(socket: Duplex, head: Buffer, options: SocketOptions): void {
    const hooks = readHooks(socket)
    const plain = this.extensions !== '' || !options.allowSynchronousEvents
    if (hooks === undefined || plain) return takeSocket.call(this, socket, head, options)
    // What is read once ws listens goes to ws.
    const buffered: Buffer = (socket.readableLength > 0 && socket.read()) || Buffer.alloc(0)
    takeSocket.call(this, socket, Buffer.alloc(0), options)
    this.#install(socket, hooks, options.maxPayload)
    this.#early = Buffer.concat([head, buffered])
    // Nobody listens for messages yet; nothing is read from the system before this.
    if (this.#early.length > 0) process.nextTick(() => this.#readEarly())
  }

  /** Takes the memory of a half-received gradient back: the rest of its frame is dropped, `received` does not come. */
  abandon(): void {
    if (this.#reader?.abandon()) this.#useBuffer?.(this.#reader.next())
  }

  /** The memory of a half-received gradient is another one from here on; what has come of its chunk is copied. */
  redirect(destination: (head: GradientHead) => Uint8Array): void {
    /* c8 ignore next -- whether a chunk is coming at that moment is for its sender to say */
    if (this.#reader?.redirect(destination)) this.#useBuffer?.(this.#reader.next())
  }

  /** Goes on with what was read before the pause. */
  override resume(): void {
    super.resume()
    if (this.#reader?.goOn()) this.#useBuffer?.(this.#reader.next())
    if (this.#early.length > 0) this.#readEarly()
  }

  override close(code?: number, reason?: string | Buffer): void {
    this.abandon()
    super.close(code, reason)
  }

  override terminate(): void {
    this.abandon()
    super.terminate()
  }

  /** Reads what has come with the upgrade, up to a pause. */
  #readEarly(): void {
    const reader = this.#reader
    assert(reader, 'a socket that is not read in place has nothing early')
    while (this.#early.length > 0 && !this.isPaused) {
      const buffer = reader.next()
      const count = Math.min(buffer.length, this.#early.length)
      buffer.set(this.#early.subarray(0, count))
      this.#early = this.#early.subarray(count)
      reader.read(count)
    }
    this.#useBuffer?.(reader.next())
  }

  #install(socket: Duplex, hooks: ReadHooks, maxPayload: number): void {
    const reader = new FrameReader({
      maxPayload,
      unmask,
      forward: (bytes) => socket.emit('data', bytes),
      destination: (head) => (this.readyState === WebSocket.OPEN ? this.sink?.destination(head) : undefined),
      received: (head) => this.sink?.received(head),
      skipped: (bytes) => this.skipped(bytes),
      small: () => this.small(),
      admit: (bytes) => this.admit(bytes),
      paused: () => this.isPaused,
    })
    this.#reader = reader
    this.#useBuffer = (buffer) => {
      Reflect.set(socket, hooks.buffer, buffer)
      Reflect.get(socket, '_handle')?.useUserBuffer(buffer)
    }
    Reflect.set(socket, hooks.callback, (count: number) => reader.read(count))
    Reflect.set(socket, hooks.generator, () => reader.next())
    this.#useBuffer(reader.next())
  }
}

/**
 * How many bytes the kernel has taken of what was written. `bytesWritten` of a socket counts what waits as well: this
 * is what its handle was given less what libuv keeps, as in `_onTimeout` (lib/net.js of Node 12 to 24).
 */
export function bytesTaken(socket: Socket): number {
  const handle: { bytesWritten: number; writeQueueSize: number } | null = Reflect.get(socket, '_handle')
  return handle ? handle.bytesWritten - handle.writeQueueSize : 0
}

/** The private fields behind `onread` (lib/net.js of Node 12 to 24), if this socket is one that has them. */
function readHooks(socket: Duplex): ReadHooks | undefined {
  if (Object.getPrototypeOf(socket) !== Socket.prototype) return undefined
  if (typeof Reflect.get(socket, '_handle')?.useUserBuffer !== 'function') return undefined
  const symbols = Object.getOwnPropertySymbols(socket)
  const find = (description: string) => symbols.find((symbol) => symbol.description === description)
  const [buffer, callback, generator] = [find('kBuffer'), find('kBufferCb'), find('kBufferGen')]
  return buffer && callback && generator ? { buffer, callback, generator } : undefined
}
