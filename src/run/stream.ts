import assert from 'node:assert'
import type { FastifyBaseLogger } from 'fastify'
import type { RawData, WebSocket } from 'ws'
import { type Config, VERSION } from '../config.js'
import type { Device } from '../device/device.js'
import type { Slot } from '../device/staging.js'
import { type ErrorFields, ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import { Assembly, chunksOf } from '../wire/chunks.js'
import { decodeClientFrame, encodeFrame, encodeHeader, type GradientHead } from '../wire/codec.js'
import type { ClientFrame, EndFrame, GradientFrame, OpenFrame, StepFrame } from '../wire/frame.js'
import { type GradientSink, InPlaceWebSocket } from './receiver.js'
import type { Run, Update, Writer } from './run.js'
import type { Runs } from './runs.js'
import { Sender } from './sender.js'

export type StreamContext = {
  config: Config
  device: Device
  runs: Runs
  metrics: Metrics
  log: FastifyBaseLogger
  /** How many bytes the connection has read so far, from the socket below the WebSocket. */
  bytesRead: () => number
}

/** A gradient that is being received into its slot of the staging arena. */
type Reception = {
  run: Run
  parameter: number
  step: number
  assembly: Assembly
  slot: Slot
  startedAt: number
}

// A peer that was told to go gets this long to take the last frames before its socket is cut.
const GRACE_MS = 1000
// What may wait for a peer that does not read: the sender's window, one more chunk, and some ten thousand small frames.
const UNREAD_BYTES = 32 << 20
// A pong in waiting takes far more memory than its bytes. One read of 64 KiB brings up to 10923 pings.
const UNREAD_PONGS = 20_000

/** One connection: it takes frames in their order, hands gradients to its run and sends updates as they are computed. */
export class Stream implements Writer, GradientSink {
  readonly #socket: WebSocket
  readonly #context: StreamContext
  readonly #sender: Sender
  readonly #gone = new AbortController()
  #run: Run | undefined
  #inbox: { bytes: Uint8Array; binary: boolean }[] = []
  #pumping = false
  #reception: Reception | undefined
  /** The gradient whose first chunk was refused: the rest of it is dropped. */
  #dropped: { parameter: number; step: number } | undefined
  /** The step whose `step` frame was refused, until one is accepted. */
  #refusedStep: number | undefined
  /** Parameters whose update is being computed or sent. */
  #outstanding = new Map<number, Promise<void>>()
  #outstandingBytes = 0
  #leaving = false
  #draining = false
  #waitsForStaging = false
  readonly #connectedAt = performance.now()
  #read = { bytes: 0, at: this.#connectedAt }
  /** Pongs that the kernel has not taken yet. */
  #unreadPongs = 0
  #timer: NodeJS.Timeout

  constructor(socket: WebSocket, context: StreamContext) {
    this.#socket = socket
    this.#context = context
    this.#sender = new Sender(socket)
    if (socket instanceof InPlaceWebSocket) socket.sink = this
    socket.on('message', (data, binary) => this.#receive(data, binary))
    socket.on('ping', (data) => this.#pong(data))
    socket.on('error', (error) => this.#refuseMessage(error))
    socket.once('close', () => this.#closed())
    const { send_timeout_seconds, open_timeout_seconds } = context.config
    this.#timer = setInterval(() => this.#checkProgress(), Math.min(send_timeout_seconds, open_timeout_seconds) * 250)
    this.#timer.unref()
  }

  /** Gradient bytes that this connection has under way, and update bytes that it has not sent. */
  get inFlightBytes(): number {
    return (this.#reception?.slot.bytes ?? 0) + this.#outstandingBytes
  }

  async fence(): Promise<void> {
    this.#leave(4409, 'another connection has taken the run over')
    await this.#sender.idle()
  }

  expel(error: ServiceError): void {
    this.#run = undefined
    this.#report(error)
  }

  /** Tells the client that the service shuts down; the connection ends with the step in flight. */
  drain(deadline_seconds: number): void {
    this.#draining = true
    this.#send({ type: 'draining', deadline_seconds })
    if (!this.#stepInFlight) this.#leave(1012, 'the service shuts down')
  }

  /** Where the next chunk of the gradient in reception goes. Everything else, and whatever is wrong, goes the ordinary way. */
  destination({ parameter, step, offset, dataLength }: GradientHead): Uint8Array | undefined {
    const reception = this.#reception
    if (this.#pumping || this.#leaving || reception?.parameter !== parameter || reception.step !== step)
      return undefined
    const { assembly, slot } = reception
    const fits = offset === assembly.received && offset + dataLength <= assembly.bytes
    if (!fits || dataLength > this.#context.config.chunk_bytes) return undefined
    const { device } = this.#context
    return device.view(device.stagingBlock).subarray(slot.offset + offset, slot.offset + offset + dataLength)
  }

  received({ offset, dataLength }: GradientHead): void {
    const reception = this.#reception
    assert(reception, 'whoever ends a reception abandons the destination')
    reception.assembly.accept({ offset, length: dataLength })
    this.#stored(reception, dataLength)
  }

  get #stepInFlight(): boolean {
    return this.#reception !== undefined || this.#outstanding.size > 0 || (this.#run?.ahead.length ?? 0) > 0
  }

  #receive(data: RawData, binary: boolean): void {
    this.#checkUnread()
    if (this.#leaving) return
    assert(Buffer.isBuffer(data), 'ws gives a Buffer in its default mode; fragments were joined by it')
    this.#inbox.push({ bytes: data, binary })
    if (!this.#pumping) void this.#pump()
  }

  /** Handles what was received in its order. The socket is not read while a frame has to wait for something. */
  async #pump(): Promise<void> {
    this.#pumping = true
    for (let message = this.#inbox.shift(); message && !this.#leaving; message = this.#inbox.shift()) {
      try {
        const waits = this.#handle(message.bytes, message.binary)
        if (waits === undefined) continue
        this.#socket.pause()
        await waits
      } catch (error) {
        this.#report(error)
      }
    }
    this.#pumping = false
    this.#socket.resume()
  }

  #handle(bytes: Uint8Array, binary: boolean): Promise<void> | undefined {
    if (!binary) throw new ServiceError('FRAME_MALFORMED', 'a text message, expected are binary ones', { close: 1003 })
    const frame = this.#decode(bytes)
    if (this.#reception && frame.type !== 'gradient') {
      throw new ServiceError(
        'FRAME_UNEXPECTED',
        `a frame '${frame.type}' while ${this.#reception.assembly.label} is incomplete`,
      )
    }
    if (frame.type !== 'gradient') this.#dropped = undefined
    if (frame.type === 'open') return this.#open(frame)
    const run = this.#run
    if (!run) throw new ServiceError('FRAME_UNEXPECTED', `a frame '${frame.type}' before a successful open`)
    return this.#dispatch(run, frame)
  }

  // After `open` only a `step` frame can be refused by its bytes without ending the connection.
  #decode(bytes: Uint8Array): ClientFrame {
    try {
      return decodeClientFrame(bytes, this.#context.config)
    } catch (error) {
      if (this.#run) this.#refusedStep = this.#run.step + 1
      throw error
    }
  }

  #dispatch(run: Run, frame: Exclude<ClientFrame, OpenFrame>): Promise<void> | undefined {
    switch (frame.type) {
      case 'step':
        return this.#step(run, frame)
      case 'gradient':
        return this.#gradient(run, frame)
      case 'end':
        return this.#end(run, frame)
      case 'checkpoint':
        throw new ServiceError('FRAME_UNEXPECTED', 'checkpoints are not supported yet')
      default:
        return frame satisfies never
    }
  }

  async #open(frame: OpenFrame): Promise<void> {
    if (this.#run)
      throw new ServiceError('FRAME_UNEXPECTED', `this connection has opened run '${this.#run.name}' already`)
    const { config, device, log } = this.#context
    const { run, resumed } = await this.#context.runs.open(frame, this)
    if (this.#leaving) return run.detach(this)
    this.#run = run
    log.info({ event: 'run_opened', run: run.name, epoch: run.epoch, step: run.step, resumed, client: frame.client })
    const { chunk_bytes, staging_bytes, max_parameters } = config
    const server = { name: 'muond', version: VERSION, device: device.name, onnxruntime: device.version }
    this.#send({
      type: 'opened',
      ...run.opened(resumed),
      limits: { chunk_bytes, staging_bytes, max_parameters },
      server,
    })
  }

  #step(run: Run, { step, groups = {}, gradient_scale = 1, max_logits }: StepFrame): undefined {
    this.#refusedStep = step
    const unknown = Object.keys(max_logits ?? {})[0]
    if (unknown !== undefined)
      throw new ServiceError('MAX_LOGITS_INVALID', `run '${run.name}' has no attention '${unknown}'`, { step })
    run.setStep(step, { groups, gradient_scale })
    this.#refusedStep = undefined
  }

  // What was streamed behind a refused `step` frame must not be applied with the values that the client wanted changed.
  #checkNotRefused(step: number): void {
    if (this.#refusedStep !== step) return
    throw new ServiceError('STEP_CONFLICT', `the step frame of step ${step} was refused, send it again`, { step })
  }

  #gradient(run: Run, frame: GradientFrame): Promise<void> | undefined {
    const { parameter, step, offset, data } = frame
    if (this.#dropped?.parameter === parameter && this.#dropped.step === step && offset > 0) return undefined
    this.#dropped = undefined
    const reception = this.#reception
    if (!reception) return this.#begin(run, frame)
    if (reception.parameter !== parameter || reception.step !== step) {
      throw new ServiceError(
        'FRAME_UNEXPECTED',
        `a chunk of parameter ${parameter}, step ${step} while ${reception.assembly.label} is incomplete`,
      )
    }
    try {
      reception.assembly.accept({ offset, length: data.length })
    } catch (error) {
      this.#abandonReception()
      this.#dropped = { parameter, step }
      this.#countRefused(error)
      throw error
    }
    this.#store(reception, frame)
    return undefined
  }

  /** Takes a gradient's first chunk: checks that it may be applied, and reserves its whole size. */
  #begin(run: Run, frame: GradientFrame): Promise<void> | undefined {
    const { parameter, step, offset, data } = frame
    if (offset === 0) this.#dropped = { parameter, step }
    const { name, gradient_bytes } = run.parameter(parameter)
    const assembly = new Assembly(gradient_bytes, `the gradient of parameter '${name}' for step ${step}`)
    if (offset > 0) assembly.accept({ offset, length: data.length })
    if (this.#context.runs.draining && !this.#stepInFlight) {
      throw new ServiceError('DRAINING', 'the service shuts down and begins no step', {
        parameter,
        step,
        close: 1012,
      })
    }
    try {
      this.#checkNotRefused(step)
      run.expect(parameter, step)
      assembly.accept({ offset, length: data.length })
    } catch (error) {
      this.#countRefused(error)
      throw error
    }
    this.#dropped = undefined
    const startedAt = performance.now()
    const start = (slot: Slot) => {
      this.#reception = { run, parameter, step, assembly, slot, startedAt }
      this.#read = { bytes: this.#context.bytesRead(), at: performance.now() }
      this.#store(this.#reception, frame)
    }
    const outstanding = this.#outstanding.get(parameter)
    const slot = outstanding ? undefined : this.#context.device.staging.tryReserve(gradient_bytes)
    if (slot) return void start(slot)
    return this.#startWhenFree(outstanding, gradient_bytes, start)
  }

  // One update per parameter is kept, so the same parameter again waits until that was sent.
  async #startWhenFree(
    outstanding: Promise<void> | undefined,
    bytes: number,
    start: (slot: Slot) => void,
  ): Promise<void> {
    await outstanding
    const { staging } = this.#context.device
    this.#waitsForStaging = true
    const slot = await staging.reserve(bytes, this.#gone.signal)
    this.#waitsForStaging = false
    if (slot === undefined) return
    if (this.#leaving) staging.release(slot)
    else start(slot)
  }

  #store(reception: Reception, { offset, data }: GradientFrame): void {
    const { device } = this.#context
    device.view(device.stagingBlock).set(data, reception.slot.offset + offset)
    this.#stored(reception, data.length)
  }

  #stored(reception: Reception, bytes: number): void {
    this.#context.metrics.received_bytes_total.inc(bytes)
    if (!reception.assembly.complete) return
    this.#reception = undefined
    const { run } = reception
    run.spend('receive', (performance.now() - reception.startedAt) / 1000)
    const bytesUnderWay = reception.slot.bytes + run.parameter(reception.parameter).update_bytes
    this.#outstandingBytes += bytesUnderWay
    const work = this.#answer(reception).finally(() => {
      this.#outstandingBytes -= bytesUnderWay
      this.#outstanding.delete(reception.parameter)
    })
    this.#outstanding.set(reception.parameter, work)
  }

  /** Has one gradient computed and sends its update; refusals are told with the parameter and step they belong to. */
  async #answer({ run, parameter, step, slot }: Reception): Promise<void> {
    const { device } = this.#context
    try {
      const range = { block: device.stagingBlock, offset: slot.offset, bytes: slot.bytes }
      const update = await run.compute(parameter, step, range).finally(() => device.staging.release(slot))
      // A connection that has lost its run must not touch the run's memory: it may be gone.
      if (update && !this.#leaving) await this.#sendUpdate(run, { parameter, step, update })
    } catch (error) {
      this.#countRefused(error)
      this.#report(error)
    }
  }

  async #sendUpdate(
    run: Run,
    { parameter, step, update }: { parameter: number; step: number; update: Update },
  ): Promise<void> {
    const startedAt = performance.now()
    const { device, config, metrics } = this.#context
    const { block, offset: start, bytes } = update.range
    const payload = device.view(block).subarray(start, start + bytes)
    const { scale, decay, replayed, gradient_norm, update_rms } = update
    const sent = [...chunksOf(bytes, config.chunk_bytes)].map(async ({ offset, length }) => {
      const first = offset === 0 ? { scale, decay, replayed, gradient_norm, update_rms } : {}
      const header = encodeHeader({ type: 'update', parameter, step, offset, ...first }, length)
      const whole = await this.#sender.send({ header, payload: payload.subarray(offset, offset + length) })
      if (whole) metrics.sent_bytes_total.inc(length)
    })
    await Promise.all(sent)
    run.spend('send', (performance.now() - startedAt) / 1000)
  }

  /** Ends a step once all its updates were sent. The receipt is out before anything of the next step is looked at. */
  async #end(run: Run, { step, skipped = [] }: EndFrame): Promise<void> {
    await Promise.allSettled(this.#outstanding.values())
    if (this.#leaving) return
    this.#checkNotRefused(step)
    const receipt = run.end(step, skipped)
    if (!receipt.replayed) this.#measure(receipt.seconds)
    await this.#sender.send({ header: encodeFrame(receipt) })
    if (this.#draining) this.#leave(1012, 'the service shuts down')
  }

  #measure(seconds: Readonly<Record<'receive' | 'queue' | 'compute' | 'send', number>>): void {
    const { metrics } = this.#context
    metrics.steps_total.inc()
    for (const phase of ['receive', 'queue', 'compute', 'send'] as const) {
      metrics.step_phase_seconds.observe({ phase }, seconds[phase])
    }
  }

  #countRefused(error: unknown): void {
    const code = error instanceof ServiceError ? error.code : 'INTERNAL'
    this.#context.metrics.refused_gradients_total.inc({ code })
  }

  /** Tells the client of an error. A bug of ours is logged and told as INTERNAL, without its text. */
  #report(error: unknown): void {
    if (this.#leaving) return
    const { log, metrics } = this.#context
    const known =
      error instanceof ServiceError
        ? error
        : new ServiceError('INTERNAL', 'an internal error; the service has logged it')
    if (known !== error) log.error({ event: 'internal_error', err: error })
    else log.info({ event: 'refused', code: known.code, reason: known.message, run: this.#run?.name })
    metrics.errors_total.inc({ code: known.code })
    if (known.close !== undefined) this.#sender.drop()
    this.#send(errorFrame(known))
    if (known.close !== undefined) this.#leave(known.close, known.code)
  }

  #send(frame: Parameters<typeof encodeFrame>[0]): void {
    void this.#sender.send({ header: encodeFrame(frame) })
  }

  // ws itself refuses what breaks the WebSocket protocol or its size limit, and closes with 1002, 1007 or 1009.
  #refuseMessage(error: Error): void {
    this.#context.log.info({ event: 'websocket_error', reason: error.message })
    this.#context.metrics.errors_total.inc({
      code: error.message.includes('size') ? 'FRAME_TOO_LARGE' : 'FRAME_MALFORMED',
    })
    this.#leave(1002, 'ws has sent its own code before')
  }

  /** Ends a connection that asks for more than it reads: answers would pile up without end. */
  #checkUnread(): void {
    const bytes = this.#socket.bufferedAmount
    if (bytes <= UNREAD_BYTES && this.#unreadPongs <= UNREAD_PONGS) return
    const message = `${bytes} bytes and ${this.#unreadPongs} pongs wait to be read, at most ${UNREAD_BYTES} and ${UNREAD_PONGS} may`
    this.#report(new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 }))
  }

  // ws would answer by itself, and cut a client without a word whose pings come faster than turns of the event loop.
  #pong(data: Buffer): void {
    this.#checkUnread()
    if (this.#leaving) return
    this.#unreadPongs += 1
    this.#socket.pong(data, false, () => {
      this.#unreadPongs -= 1
    })
  }

  /** Closes the connection and cuts it where the peer does not take the close. */
  #leave(code: number, reason: string): void {
    if (this.#leaving) return
    this.#leaving = true
    this.#inbox = []
    if (code === 4409) this.#sender.drop()
    this.#abandonReception()
    this.#gone.abort()
    this.#socket.close(code, reason)
    this.#socket.resume()
    setTimeout(() => this.#socket.terminate(), GRACE_MS).unref()
  }

  #closed(): void {
    clearInterval(this.#timer)
    this.#leaving = true
    this.#abandonReception()
    this.#gone.abort()
    this.#run?.detach(this)
  }

  #abandonReception(): void {
    if (this.#socket instanceof InPlaceWebSocket) this.#socket.abandon()
    if (this.#reception) this.#context.device.staging.release(this.#reception.slot)
    this.#reception = undefined
  }

  /** Closes a connection that neither takes what waits for it nor sends the rest of what it began. */
  #checkProgress(): void {
    const bytes = this.#context.bytesRead()
    const now = performance.now()
    // A client that waits for the staging arena is kept from moving anything by us.
    if (bytes !== this.#read.bytes || this.#waitsForStaging) this.#read = { bytes, at: now }
    const { send_timeout_seconds, open_timeout_seconds } = this.#context.config
    const waits = this.#sender.busy || this.#reception !== undefined
    if (waits && now - Math.max(this.#read.at, this.#sender.movedAt) > send_timeout_seconds * 1000) {
      const message = `no byte moved for ${send_timeout_seconds} seconds`
      return this.#report(new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 }))
    }
    if (this.#run || this.#pumping || now - this.#connectedAt <= open_timeout_seconds * 1000) return
    this.#report(new ServiceError('FRAME_UNEXPECTED', `nothing was opened within ${open_timeout_seconds} seconds`))
  }
}

function errorFrame(error: ServiceError) {
  const { code, message, status, retryable } = error
  const fields: ErrorFields = error.fields
  return { type: 'error', code, message, status, retryable, ...fields } as const
}
