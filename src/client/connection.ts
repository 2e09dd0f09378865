import type { IncomingMessage } from 'node:http'
import { WebSocket } from 'ws'
import { ServiceError } from '../errors.js'
import { decodeServerFrame, encodeFrame, encodeHeader } from '../wire/codec.js'
import type {
  CheckpointedFrame,
  ClientFrame,
  GradientFrame,
  MemberStatus,
  MembersFrame,
  ServerFrame,
} from '../wire/frame.js'
import { MuondError } from './error.js'
import { closeError, frameError, refusedUpgrade } from './refusal.js'

export type Endpoint = {
  url: URL
  token?: string
  /** Options of `ws`, TLS among them, that win over the client's own. */
  socket?: WebSocket.ClientOptions
}

/** Bytes given to the socket and not yet taken by the kernel, beyond which the sender waits. */
const SEND_BUFFER_BYTES = 8 << 20

/** `opened` lists every parameter; an update is at most 16 MiB and its keys. */
const MESSAGE_BYTES = 64 << 20

/** The upgrade is one small message each way. */
const HANDSHAKE_SECONDS = 30

/**
 * The kernel probes a silent peer; it answers even while the service has paused reading, which a WebSocket ping does
 * not survive.
 */
const KEEPALIVE_SECONDS = 30

/** One WebSocket: whole frames in both directions, and one reason when it is over. */
export class Connection {
  /** Gets every frame; what it throws ends the connection with that error. */
  onFrame: (frame: ServerFrame) => void = whileIdle
  /** Gets the reason when the socket is gone, whoever ended it. */
  onClosed: (reason: unknown) => void = () => {}
  /** What `members` frames have told of each member, by its `memberKey`. */
  readonly members = new Map<string, MemberStatus>()
  /** Resolves after onClosed was called. */
  readonly closed: Promise<void>
  readonly #socket: WebSocket
  readonly #unlink: () => void
  /** Whoever waits for a `checkpointed`, in the order of their frames. It comes whenever the disk is done. */
  readonly #checkpoints: ((frame: CheckpointedFrame) => void)[] = []
  #reason: unknown
  #wake: () => void = () => {}

  /** Rejects with the HTTP error of a refused upgrade, CONNECTION_LOST, or the signal's reason. */
  static async open(endpoint: Endpoint, signal: AbortSignal): Promise<Connection> {
    signal.throwIfAborted()
    const connection = new Connection(new WebSocket(endpoint.url, socketOptions(endpoint)), signal)
    await connection.#opened()
    return connection
  }

  private constructor(socket: WebSocket, signal: AbortSignal) {
    this.#socket = socket
    const onAbort = () => this.fail(signal.reason)
    signal.addEventListener('abort', onAbort)
    this.#unlink = () => signal.removeEventListener('abort', onAbort)
    socket.on('upgrade', ({ socket: tcp }) => tcp.setKeepAlive(true, 1000 * KEEPALIVE_SECONDS))
    socket.on('unexpected-response', (_, response) => this.#refused(response))
    socket.on('message', (data, isBinary) => this.#receive(data, isBinary))
    socket.on('error', (cause) => this.#because(lost(cause)))
    this.closed = new Promise((resolve) => {
      socket.on('close', (code, reason) => {
        this.#unlink()
        this.#because(closeError(code, reason.toString()))
        this.#wake()
        this.onClosed(this.#reason)
        resolve()
      })
    })
  }

  /** Why the connection is over; undefined while it is not. */
  get reason(): unknown {
    return this.#reason
  }

  /** Resolves when the socket has room for more; throws the reason once the connection is over. */
  async send(frame: Exclude<ClientFrame, GradientFrame>): Promise<void> {
    this.#socket.send(encodeFrame(frame), { fin: true, binary: true }, () => this.#wake())
    await this.#room()
  }

  /**
   * As `send`, for a frame that ends in tensor bytes: two fragments, so that the bytes are never copied to follow the
   * header.
   */
  async sendData(frame: Omit<GradientFrame, 'data'>, data: Uint8Array): Promise<void> {
    this.#socket.send(encodeHeader(frame, data.byteLength), { fin: false, binary: true })
    this.#socket.send(data, { fin: true, binary: true }, () => this.#wake())
    await this.#room()
  }

  /** The answer to the next `checkpoint` frame; rejects with the reason where the connection ends before. */
  checkpointed(): Promise<CheckpointedFrame> {
    return new Promise((resolve, reject) => {
      this.#checkpoints.push(resolve)
      this.closed.then(() => reject(this.#reason))
    })
  }

  /** Lets go of whoever listens. At once: what follows in the same read is for nobody any more. */
  rest(): void {
    this.onFrame = whileIdle
    this.onClosed = () => {}
  }

  /** Ends the connection at once, for this reason unless it already has one. */
  fail(reason: unknown): void {
    this.#because(reason)
    this.#socket.terminate()
  }

  /** Ends the connection with a close frame, after what was already sent. */
  async close(reason: unknown): Promise<void> {
    this.#unlink()
    this.#because(reason)
    this.#socket.close(1000)
    await this.closed
  }

  /** The first reason is the true one: what follows is its consequence. */
  #because(reason: unknown): void {
    this.#reason ??= reason
  }

  async #opened(): Promise<void> {
    const opening = new Promise<true>((resolve) => this.#socket.once('open', () => resolve(true)))
    if ((await Promise.race([opening, this.closed])) !== true) throw this.#reason
  }

  async #room(): Promise<void> {
    while (this.#reason === undefined && this.#socket.bufferedAmount > SEND_BUFFER_BYTES) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
    }
    if (this.#reason !== undefined) throw this.#reason
  }

  #receive(data: WebSocket.RawData, isBinary: boolean): void {
    if (this.#reason !== undefined) return
    try {
      if (!isBinary || !Buffer.isBuffer(data))
        throw new MuondError('FRAME_MALFORMED', 'the service sent a text message')
      const frame = decodeServerFrame(data)
      // The service may have types of frames that this version does not know.
      if (frame === undefined) return
      if (frame.type === 'members') return this.#tellMembers(frame)
      const waiting = frame.type === 'checkpointed' ? this.#checkpoints.shift() : undefined
      if (frame.type === 'checkpointed' && waiting) return waiting(frame)
      this.onFrame(frame)
    } catch (error) {
      this.fail(error instanceof ServiceError ? new MuondError(error.code, error.message, {}, { cause: error }) : error)
    }
  }

  #tellMembers({ members }: MembersFrame): void {
    for (const status of members) this.members.set(memberKey(status), status)
  }

  async #refused(response: IncomingMessage): Promise<void> {
    this.fail(await refusedUpgrade(response).catch(lost))
  }
}

/** Outside a step the service has only bad news: an error ends the connection, and the next step opens another. */
export function whileIdle(frame: ServerFrame): void {
  if (frame.type === 'error') throw frameError(frame)
  if (frame.type !== 'draining')
    throw new MuondError('FRAME_UNEXPECTED', `the service sent ${frame.type} outside a step`)
}

function lost(cause: Error): MuondError {
  return new MuondError('CONNECTION_LOST', `connection lost: ${cause}`, {}, { cause })
}

function socketOptions({ url, token, socket }: Endpoint): WebSocket.ClientOptions {
  return {
    perMessageDeflate: false,
    maxPayload: MESSAGE_BYTES,
    handshakeTimeout: 1000 * HANDSHAKE_SECONDS,
    // Masking protects proxies on the way; there are none on loopback, and for a mask of zeros `ws` skips the copy.
    ...(isLocal(url) && { generateMask: (mask: Buffer) => void mask.fill(0) }),
    ...socket,
    headers: { ...(token !== undefined && { authorization: `Bearer ${token}` }), ...socket?.headers },
  }
}

/** The protocol of Unix sockets, as `ws` spells it. */
export const UNIX = 'ws+unix:'

/** Whether an address leads to this host. */
export function isLocal({ protocol, hostname }: URL): boolean {
  if (protocol === UNIX) return true
  return hostname === 'localhost' || hostname === '[::1]' || /^127\.\d+\.\d+\.\d+$/.test(hostname)
}

/** A member among those of its run. */
export function memberKey({ rank, replica = 0 }: MemberStatus): string {
  return `${replica} ${rank}`
}
