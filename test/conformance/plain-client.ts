import { on, once } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import { WebSocket } from 'ws'
import { applyUpdate } from '../../src/client/steps/apply.js'
import { atOnce } from '../../src/wire/at-once.js'
import { decodeServerFrame, encodeFrame, encodeWithData } from '../../src/wire/codec.js'
import type { ErrorFrame, OpenFrame, ServerFrame, UpdateFrame } from '../../src/wire/frame.js'
import { SERVER_FRAMES } from '../../src/wire/frame-schemas.js'
import { cursorOf, scan } from '../../src/wire/msgpack.js'

/** What a client may get wrong; each is one line of `PlainClient`. */
export type Fault =
  | 'text'
  | 'misspelt key'
  | 'end within a gradient'
  | 'whole gradients'
  | 'negative lr'
  | 'steps from 0'
  | 'missing gradient'
  | 'no takeover'
  | 'other bits'
  | 'update lost'
  | 'update twice'
  | 'no decay'
  | 'strict keys'
  | 'strict types'
  | 'one update at a time'
  | 'no pong'
  | 'impatient'
  | 'gives up'
  | 'too early'
  | 'gives up at 503'
  | 'gives up at 1012'
  | 'stops at NaN'
  | 'trains NaN on'
  | 'trains a new run on'

class Lost extends Error {
  readonly retryAfterSeconds: number

  constructor(why: string, retryAfterSeconds = 0) {
    super(why)
    this.retryAfterSeconds = retryAfterSeconds
  }
}

const SHAPES = [
  [9, 11],
  [6, 20],
]
const PATIENCE_MS = 300
const MOST_ATTEMPTS = 5

/** The smallest client that does all that a client must, written from docs/protocol.md, but for its fault. */
export class PlainClient {
  readonly #url: string
  readonly #fault: Fault | undefined
  readonly #weights = SHAPES.map(([rows = 0, cols = 0], seed) =>
    Float32Array.from({ length: rows * cols }, (_, i) => Math.sin(i + seed)),
  )
  #socket: WebSocket | undefined
  #messages: AsyncIterator<Buffer[]> | undefined
  /** With which the last connection was closed. */
  #code = 0
  #chunkBytes = 0
  #step = 0

  constructor(url: string, fault?: Fault) {
    this.#url = `${url}/v1/stream`
    this.#fault = fault
  }

  /** Trains on |W|²/2. Rejects where it cannot go on. */
  async train(steps: number): Promise<void> {
    try {
      await this.#open()
      for (let step = 1; step <= steps; step++) await this.#take(step)
    } finally {
      this.#socket?.close()
    }
  }

  #has(fault: Fault): boolean {
    return this.#fault === fault
  }

  async #open(): Promise<void> {
    const socket = new WebSocket(this.#url, { perMessageDeflate: false, autoPong: !this.#has('no pong') })
    socket.on('error', () => {})
    socket.once('close', (code) => {
      this.#code = code
    })
    this.#socket = socket
    this.#messages = on(socket, 'message', { close: ['close'] })
    const refused = once(socket, 'unexpected-response').then(() => {
      throw this.#has('gives up at 503') ? new Error('503') : new Lost('503')
    })
    await Promise.race([once(socket, 'open'), refused])
    const isFirst = this.#chunkBytes === 0
    const frame: OpenFrame = { type: 'open', protocol: 1, run: 'plain', mode: isFirst ? 'create' : 'resume' }
    const group = { name: 'all', algorithm: 'muon', lr: this.#has('negative lr') ? -1 : 0.02, weight_decay: 0.1 }
    const parameters = SHAPES.map((shape, i) => ({ name: `w${i}`, shape, group: 'all' }))
    const misspelt = { ...(this.#has('misspelt key') && { modus: 'create' }) }
    const mode = this.#has('trains a new run on') ? { mode: 'create_or_resume' as const } : {}
    const groups = isFirst || this.#has('trains a new run on') ? { groups: [group] } : {}
    const takeover = !isFirst && !this.#has('no takeover') ? { takeover: true } : {}
    const bytes = encodeFrame({ ...frame, ...mode, ...groups, ...takeover, ...misspelt, parameters })
    socket.send(bytes, { binary: !this.#has('text') })
    const opened = await this.#expect('opened')
    if (opened.step !== this.#step && opened.step !== this.#step + 1 && !this.#has('trains a new run on'))
      /* c8 ignore next -- a service that has lost a step */
      throw new Error(`the run is at step ${opened.step}, the client at ${this.#step}`)
    this.#step = this.#has('trains a new run on') ? opened.step : this.#step
    this.#chunkBytes = this.#has('whole gradients') ? 2 ** 20 : opened.limits.chunk_bytes
  }

  /** Takes a step, again over another connection as often as it must. */
  async #take(step: number): Promise<void> {
    const gradients = this.#weights.map((values) => values.slice())
    const applied = new Set<number>()
    for (let attempt = 0; ; attempt++) {
      try {
        if (attempt > 0) await this.#open()
        await this.#attempt(this.#has('trains a new run on') ? this.#step + 1 : step, { gradients, applied, attempt })
        this.#step += 1
        return
      } catch (error) {
        if (!(error instanceof Lost) || this.#has('gives up') || attempt === MOST_ATTEMPTS) throw error
        await delay(this.#has('too early') ? 0 : 1000 * error.retryAfterSeconds + 1)
      }
    }
    /* c8 ignore next -- every way leaves the loop before its end */
  }

  async #attempt(
    step: number,
    { gradients, applied, attempt }: { gradients: Float32Array[]; applied: Set<number>; attempt: number },
  ): Promise<void> {
    const number = this.#has('steps from 0') ? step - 1 : step
    for (const [parameter, values] of gradients.entries()) {
      if (parameter === 1 && this.#has('missing gradient')) continue
      if (parameter === 1 && attempt > 0 && this.#has('update lost')) continue
      if (attempt > 0 && this.#has('other bits')) values[0] += 1
      this.#gradient(parameter, number, values)
    }
    this.#end(number)
    await this.#answers(number, { gradients, applied })
  }

  #gradient(parameter: number, step: number, values: Float32Array): void {
    const bytes = new Uint8Array(values.buffer)
    for (let offset = 0; offset < bytes.length; offset += this.#chunkBytes) {
      if (offset > 0 && this.#has('end within a gradient')) this.#end(step)
      const header = { type: 'gradient', parameter, step, offset } as const
      this.#socket!.send(encodeWithData(header, bytes.subarray(offset, offset + this.#chunkBytes)))
    }
  }

  #end(step: number): void {
    this.#socket!.send(encodeFrame({ type: 'end', step }))
  }

  async #answers(
    step: number,
    { gradients, applied }: { gradients: Float32Array[]; applied: Set<number> },
  ): Promise<void> {
    const coming = new Map<number, { frame: UpdateFrame; bytes: Buffer }>()
    for (;;) {
      const frame = await this.#next()
      if (frame.type === 'receipt') return
      if (frame.type === 'error') this.#refused(frame, step, gradients)
      if (frame.type !== 'update') continue
      const { parameter, offset, data = Buffer.alloc(0) } = frame
      const known = coming.get(parameter)
      if (offset > 0 && this.#has('one update at a time') && [...coming.keys()].at(-1) !== parameter)
        throw new Error('chunks of another update')
      const update = known && offset > 0 ? known : { frame, bytes: Buffer.alloc(0) }
      update.bytes = Buffer.concat([update.bytes, data])
      coming.set(parameter, update)
      if (update.bytes.length === 4 * this.#weights[parameter]!.length) this.#apply(update, applied)
    }
  }

  #apply({ frame, bytes }: { frame: UpdateFrame; bytes: Buffer }, applied: Set<number>): void {
    const { parameter, scale = 0, decay = 0 } = frame
    if (applied.has(parameter) && !this.#has('update twice')) return
    applied.add(parameter)
    const data = Uint8Array.from(bytes)
    applyUpdate(this.#weights[parameter]!, { scale, decay: this.#has('no decay') ? 0 : decay, dtype: 'float32', data })
  }

  /** Sends a refused gradient again; the `end` behind it was refused as well. */
  #refused(
    { code, parameter, retryable, retry_after_seconds, message }: ErrorFrame,
    step: number,
    gradients: Float32Array[],
  ) {
    /* c8 ignore next -- which error comes first depends on time */
    if (retryable) throw new Lost(message, retry_after_seconds)
    if (code === 'GRADIENT_NOT_FINITE' && parameter !== undefined) {
      if (this.#has('stops at NaN')) throw new Error(message)
      if (this.#has('trains NaN on')) return
      return this.#gradient(parameter, step, gradients[parameter]!)
    }
    if (code !== 'STEP_INCOMPLETE' || this.#has('missing gradient')) throw new Error(`${code}: ${message}`)
    this.#end(this.#has('trains NaN on') ? step + 1 : step)
  }

  async #expect<T extends ServerFrame['type']>(type: T): Promise<Extract<ServerFrame, { type: T }>> {
    const frame = await this.#next()
    if (frame.type === 'error' && frame.retryable) throw new Lost(frame.message, frame.retry_after_seconds)
    if (frame.type === 'error') throw new Error(`${frame.code}: ${frame.message}`)
    /* c8 ignore next -- a service that answers otherwise */
    if (frame.type !== type) throw new Error(`a frame ${frame.type}, expected ${type}`)
    return frame as Extract<ServerFrame, { type: T }>
  }

  /** The next frame whose type is known. */
  async #next(): Promise<ServerFrame> {
    for (;;) {
      const message = await this.#message()
      if (this.#has('strict keys')) refuseUnknownKeys(message)
      const frame = decodeServerFrame(message)
      if (frame !== undefined) return frame
      if (this.#has('strict types')) throw new Error('an unknown type of frame')
    }
  }

  async #message(): Promise<Buffer> {
    const late = new AbortController()
    const answers = [this.#messages!.next()]
    const patience = delay(PATIENCE_MS, undefined, { signal: late.signal }).then(() => {
      throw new Error('no answer in time')
    })
    patience.catch(() => {})
    const { value, done } = await Promise.race(this.#has('impatient') ? [...answers, patience] : answers)
    late.abort()
    if (!done) return value[0]!
    if (this.#code === 1012 && this.#has('gives up at 1012')) throw new Error('closed with 1012')
    throw new Lost(`closed with ${this.#code}`)
  }
}

function refuseUnknownKeys(message: Buffer): void {
  const { type } = decodeServerFrame(message) ?? {}
  if (type === undefined) return
  const { required, optional } = SERVER_FRAMES[type]
  const keys = atOnce(scan(cursorOf(message), () => {})).keys()
  const unknown = [...keys].filter((key) => !(key in required) && !(key in optional))
  if (unknown.length > 0) throw new Error(`unknown keys ${unknown}`)
}
