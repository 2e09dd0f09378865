import assert from 'node:assert'
import type { WebSocket } from 'ws'
import { ServiceError } from '../../errors.js'
import { decodeClientFrame, decodeServerFrame, encodeFrame } from '../../wire/codec.js'
import type { ClientFrame, ErrorFrame, OpenFrame, ServerFrame, TransportOffer } from '../../wire/frame.js'
import { BLAMED, type Findings } from './checks.js'
import type { Course } from './course.js'
import type { Scene } from './scene.js'

/** What a link needs of the stage that it is part of. */
export type Backstage = {
  readonly findings: Findings
  readonly chunk_bytes: number
  /** The run that an `open` is for; `isReturn` where it had a connection before. */
  enter(frame: OpenFrame): { course: Course; isReturn: boolean }
  /** The client begins a step: the next scene. */
  advance(course: Course): void
  /** A frame has come. */
  heard(): void
}

/** The close codes that a peer may be told; the others say that it was told none. */
const isCode = (code: number) =>
  code === 1000 || (code > 1000 && code < 1015 && ![1004, 1005, 1006].includes(code)) || code >= 3000
const SHOWN_BYTES = 48
const FRAMES_SHOWN = 3
const REFUSED_TRANSPORT = 'muond conformance looks at every frame: tensors come over the socket'

/** One connection of the client, and one to the service behind it. Each message is looked at on its way. */
export class Link {
  /** Whether the run had a connection before. */
  isReturn = false
  readonly #client: WebSocket
  readonly #service: WebSocket
  readonly #stage: Backstage
  #course: Course | undefined
  #offers: readonly TransportOffer[] = []
  #isCut = false
  #recent: string[] = []
  /** Whether what the service is about to refuse was told already, with its bytes. */
  #isBlamed = false

  constructor(client: WebSocket, service: WebSocket, stage: Backstage) {
    this.#client = client
    this.#service = service
    this.#stage = stage
    let [up, down] = [Promise.resolve(), Promise.resolve()]
    client.on('message', (data, isBinary) => {
      up = up.then(() => this.#up(bufferOf(data), isBinary))
    })
    service.on('message', (data) => {
      down = down.then(() => this.#down(bufferOf(data)))
    })
    client.on('close', (code) => up.then(() => this.#left(code)))
    service.on('close', (code, reason) => down.then(() => this.close(code, reason.toString())))
    for (const socket of [client, service]) socket.on('error', () => socket.terminate())
  }

  /** Tells the client a message, in so many fragments. */
  tell(message: Buffer, fragments = 1): void {
    /* c8 ignore next -- the connection may be cut while something waits to be told */
    if (this.#isCut) return
    const frame = decodeServerFrame(message)
    if (frame) this.#course?.told(frame)
    const length = Math.ceil(message.length / fragments)
    for (let at = 0; at < message.length; at += length)
      this.#client.send(message.subarray(at, at + length), { binary: true, fin: at + length >= message.length })
  }

  ping(answered: () => void): void {
    this.#client.once('pong', answered)
    this.#client.ping('muond')
  }

  /** Reads nothing of the client until `wait` settles. */
  async unread(wait: Promise<unknown>): Promise<void> {
    this.#client.pause()
    await wait
    this.#client.resume()
  }

  /** Takes the connection from the client. The service does not notice. */
  cut(): void {
    this.#isCut = true
    this.#course?.lost()
    this.#client.terminate()
  }

  close(code: number, reason: string): void {
    this.#course?.lost()
    this.#service.close()
    if (isCode(code)) this.#client.close(code, reason)
    else this.#client.terminate()
  }

  /** Answers with an error instead of the service, and closes. */
  refuse(error: Buffer, code: number): void {
    this.#client.send(error)
    this.close(code, '')
  }

  /** Ends both connections at once. */
  end(): void {
    this.#client.terminate()
    this.#service.terminate()
  }

  #left(code: number): void {
    if (this.#isCut) return
    this.#course?.lost()
    if (isCode(code)) this.#service.close(code)
    else this.#service.close()
  }

  async #up(bytes: Buffer, isBinary: boolean): Promise<void> {
    this.#stage.heard()
    /* c8 ignore next -- what was on its way when the connection was cut */
    if (this.#isCut) return
    const frame = this.#read(bytes, isBinary)
    const message = frame ? await this.#passed(frame, bytes) : bytes
    if (message && !this.#isCut) this.#service.send(message, { binary: isBinary })
  }

  /** What goes on to the service in place of a frame. */
  async #passed(frame: ClientFrame, bytes: Buffer): Promise<Buffer | undefined> {
    const message = frame.type === 'open' ? this.#open(frame, bytes) : bytes
    const course = this.#course
    if (!course) return message
    if ('step' in frame && frame.step === course.step + 1) {
      const isOver = await course.over()
      /* c8 ignore next -- a client may have begun the next step when the receipt is lost */
      if (this.#isCut) return undefined
      // Else the service has the word, which refuses the frame.
      if (isOver) this.#stage.advance(course)
    }
    if (frame.type === 'end' && frame.step === course.step) course.ending()
    if (frame.type === 'gradient') course.sent(frame)
    if (frame.type === 'step' && (frame.groups || frame.gradient_scale !== undefined))
      this.#stage.findings.pass('hyperparameters')
    return course.scene?.up ? course.scene.up({ frame, message, link: this, course }) : message
  }

  /** Reads a message as the service will, and tells what is wrong with its bytes. */
  #read(bytes: Buffer, isBinary: boolean): ClientFrame | undefined {
    const { findings, chunk_bytes } = this.#stage
    this.#isBlamed = true
    try {
      if (!isBinary) throw new ServiceError('FRAME_MALFORMED', 'a text message: send every frame as a binary message')
      const frame = decodeClientFrame(bytes, { chunk_bytes })
      this.#recent = [...this.#recent.slice(1 - FRAMES_SHOWN), labelOf(frame)]
      this.#isBlamed = false
      findings.pass('frames')
      return frame
    } catch (error) {
      assert(error instanceof ServiceError)
      const { [error.code]: check = 'frames' } = BLAMED
      findings.fail(check, `${error.message}: the message is ${shown(bytes)}`)
      return undefined
    }
  }

  #open(frame: OpenFrame, bytes: Buffer): Buffer {
    const { course, isReturn } = this.#stage.enter(frame)
    this.#course = course
    this.isReturn = isReturn
    course.declare(frame.parameters)
    const { transport, ...rest } = frame
    this.#offers = transport ?? []
    return transport ? encodeFrame(rest) : bytes
  }

  async #down(bytes: Buffer): Promise<void> {
    this.#stage.heard()
    const frame = decodeServerFrame(bytes)
    if (!frame || this.#isCut) return
    const course = this.#course
    if (frame.type === 'error') this.#judge(frame, course?.scene)
    if (!course) return this.tell(bytes)
    if (frame.type === 'checkpointed') this.#stage.findings.pass('checkpoint')
    const message = frame.type === 'opened' ? this.#opened(frame, course) : bytes
    const passing = { frame, message, link: this, course }
    for (const told of (await course.scene?.down?.(passing)) ?? [message]) this.tell(told)
  }

  #opened(frame: Extract<ServerFrame, { type: 'opened' }>, course: Course): Buffer {
    this.#stage.findings.pass('values')
    course.declare(frame.parameters)
    course.resume(frame.step)
    if (this.#offers.length === 0) return encodeFrame(frame)
    const refused = this.#offers.map(({ kind }) => ({ kind, reason: REFUSED_TRANSPORT }))
    return encodeFrame({ ...frame, transport: { kind: 'websocket', refused } })
  }

  #judge({ code, message }: ErrorFrame, scene: Scene | undefined): void {
    const check = BLAMED[code]
    if (check === undefined || this.#isBlamed || (scene?.acted && scene.pardons.includes(code))) return
    this.#stage.findings.fail(check, `${code}: ${message}; the last frames were ${this.#recent.join(', ')}`)
  }
}

function bufferOf(data: WebSocket.RawData): Buffer {
  assert(Buffer.isBuffer(data), 'ws gives a Buffer in its default mode')
  return data
}

function shown(bytes: Buffer): string {
  const head = bytes.subarray(0, SHOWN_BYTES).toString('hex')
  return bytes.length > SHOWN_BYTES ? `${head}… (${bytes.length} bytes)` : head
}

function labelOf(frame: ClientFrame): string {
  if (frame.type === 'gradient')
    return `gradient (parameter ${frame.parameter}, step ${frame.step}, offset ${frame.offset}, ${frame.data.length} bytes)`
  return 'step' in frame ? `${frame.type} (step ${frame.step})` : frame.type
}
