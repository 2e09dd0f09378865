import assert from 'node:assert'
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { type ClientOptions, WebSocket } from 'ws'
import { type App, buildApp } from '../src/app.js'
import { configOf } from '../src/config.js'
import type { ErrorCode } from '../src/errors.js'
import { decodeServerFrame, encodeFrame, encodeWithData } from '../src/wire/codec.js'
import type { ClientFrame, GradientFrame, ReceiptFrame, ServerFrame } from '../src/wire/frame.js'
import { Extent } from '../src/wire/ranges.js'
import { gaussian } from './reference.js'

export type Service = App & { url: string; http: string }
type Settings = Parameters<typeof configOf>[0]

/** The real app on the CPU device, on a free port of the loopback. Close it with `service.app.close()`. */
export async function startService(settings: Settings = {}): Promise<Service> {
  const config = configOf({ device: 'cpu', port: 0, staging_bytes: 2 ** 26, ...settings })
  const built = await buildApp({ config })
  await built.app.listen({ port: config.port, host: '127.0.0.1' })
  const { port } = built.app.server.address() as AddressInfo
  return { ...built, http: `http://127.0.0.1:${port}`, url: `ws://127.0.0.1:${port}/v1/stream` }
}

export const normal = (seed: number, count: number) => Float32Array.from(gaussian(seed, count))
type Elements = Float32Array | Uint16Array | Uint8Array
export const bytesOf = (values: Elements) => new Uint8Array(values.buffer, values.byteOffset, values.byteLength)

/** Gives the service, which runs in this process, a turn of the event loop. */
export const turn = () => new Promise((resolve) => setImmediate(resolve))

export async function until(holds: () => boolean): Promise<void> {
  while (!holds()) await turn()
}

/** How many errors of this code the service has told. */
export async function told({ metrics }: Service, code: ErrorCode): Promise<number> {
  const { values } = await metrics.errors_total.get()
  return values.filter(({ labels }) => labels.code === code).reduce((sum, { value }) => sum + value, 0)
}

export type ReceivedUpdate = {
  scale: number
  decay: number
  replayed: boolean
  gradient_norm: number
  update_rms: number
  row_scale?: Buffer
  data: Buffer
}

type Closed = { type: 'closed'; code: number; reason: string }

/** A client for frames only: it sends what a test gives it, also wrong frames. */
export class RawClient {
  readonly socket: WebSocket
  readonly updates = new Map<number, ReceivedUpdate>()
  #frames: ServerFrame[] = []
  #waiting: ((frame: ServerFrame) => void)[] = []
  #closed: Promise<Closed>

  private constructor(socket: WebSocket) {
    this.socket = socket
    socket.on('message', (data) => this.#take(known(decodeServerFrame(data as Buffer))))
    this.#closed = once(socket, 'close').then(
      ([code, reason]): Closed => ({ type: 'closed', code, reason: String(reason) }),
    )
    socket.on('error', () => {})
  }

  static async connect(url: string, options: ClientOptions = {}): Promise<RawClient> {
    const socket = new WebSocket(url, { perMessageDeflate: false, ...options })
    const client = new RawClient(socket)
    await once(socket, 'open')
    return client
  }

  send(frame: Exclude<ClientFrame, GradientFrame>): void {
    this.socket.send(encodeFrame(frame))
  }

  /** Sends a gradient, or the bytes of it that `extent` has, in chunks of at most `chunk` bytes. */
  gradient(
    parameter: number,
    step: number,
    { values, chunk = 2 ** 20, extent }: { values: Elements; chunk?: number; extent?: Extent },
  ): void {
    const bytes = bytesOf(values)
    for (const { offset, pieces } of (extent ?? Extent.whole(bytes.length)).cuts(chunk)) {
      const data = Buffer.concat(pieces.map((piece) => bytes.subarray(piece.offset, piece.offset + piece.length)))
      this.socket.send(encodeWithData({ type: 'gradient', parameter, step, offset }, data))
    }
  }

  /** The next frame that is no update; updates before it are put together in `updates`. */
  next(): Promise<ServerFrame> {
    const frame = this.#frames.shift()
    return frame ? Promise.resolve(frame) : new Promise((resolve) => this.#waiting.push(resolve))
  }

  async expect<T extends ServerFrame['type']>(type: T): Promise<Extract<ServerFrame, { type: T }>> {
    const frame = await Promise.race([this.next(), this.#closed])
    assert.equal(frame.type, type, `expected ${type}, got ${JSON.stringify(frame)}`)
    return frame as Extract<ServerFrame, { type: T }>
  }

  async open(frame: Partial<Extract<ClientFrame, { type: 'open' }>> & { run: string }) {
    this.send({ type: 'open', protocol: 1, ...frame })
    return this.expect('opened')
  }

  /** Sends a whole step in the given order of parameters and waits for its receipt. */
  async step(
    step: number,
    gradients: readonly Elements[],
    order: readonly number[] = gradients.map((_, i) => i),
    chunk?: number,
  ): Promise<ReceiptFrame> {
    for (const index of order) this.gradient(index, step, { values: gradients[index]!, chunk })
    this.send({ type: 'end', step })
    return this.expect('receipt')
  }

  closed(): Promise<Closed> {
    return this.#closed
  }

  async close(): Promise<void> {
    this.socket.close()
    await this.#closed
  }

  #take(frame: ServerFrame): void {
    if (frame.type === 'update') return this.#assemble(frame)
    const waiting = this.#waiting.shift()
    if (waiting) waiting(frame)
    else this.#frames.push(frame)
  }

  #assemble(frame: Extract<ServerFrame, { type: 'update' }>): void {
    const {
      parameter,
      data = Buffer.alloc(0),
      scale,
      decay = 0,
      replayed = false,
      gradient_norm = 0,
      update_rms = 0,
      row_scale,
    } = frame
    // The factors are in an update's first frame.
    if (scale !== undefined)
      this.updates.set(parameter, {
        ...{ scale, decay, replayed, gradient_norm, update_rms, data: Buffer.from(data) },
        ...(row_scale && { row_scale: Buffer.from(row_scale) }),
      })
    else this.updates.get(parameter)!.data = Buffer.concat([this.updates.get(parameter)!.data, data])
  }
}

/** A frame of this service; one of a type that its own decoder does not know fails the test. */
export function known(frame: ServerFrame | undefined): ServerFrame {
  /* c8 ignore next -- fails the test */
  if (frame === undefined) throw new Error('the service sent a frame of an unknown type')
  return frame
}
