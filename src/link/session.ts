import assert from 'node:assert'
import type { Socket } from 'node:net'
import type { FastifyBaseLogger } from 'fastify'
import type { RawData, WebSocket } from 'ws'
import { Meter } from '../access/meter.js'
import type { Principal } from '../access/principal.js'
import type { Rate } from '../access/rate.js'
import type { Cluster } from '../cluster/cluster.js'
import type { OpenedWhole } from '../cluster/head/wholes.js'
import { ServiceError } from '../errors.js'
import type { Opened, Runs } from '../keep/runs.js'
import { refusalOf } from '../run/history.js'
import type { Connection } from '../run/members/member.js'
import { inSlices, sliceEnd, turn } from '../run/slices.js'
import { decodingClientFrame, encodeFrame, encodingOpened, type GradientHead } from '../wire/codec.js'
import type { CheckpointFrame, ClientFrame, EndFrame, MemberStatus, OpenFrame, TransportAnswer } from '../wire/frame.js'
import { Answers, type Joined, type Means } from './answers.js'
import { beginCheckpoint } from './checkpointing.js'
import { Control } from './control.js'
import { Ends } from './ends.js'
import { errorFrame } from './error-frame.js'
import { News } from './news.js'
import { aboutService, openFrame } from './opening.js'
import { unreadProblem, Window } from './pace.js'
import { Pauses } from './pauses.js'
import { accessLost } from './permission.js'
import { Reception } from './reception.js'
import { agree, type SharedArenas } from './transport.js'
import type { Claim, Intake } from './websocket/intake.js'
import { Sender } from './websocket/sender.js'
import { SmallFrames } from './websocket/small-frames.js'
import { bytesTaken, type GradientSink, InPlaceWebSocket } from './websocket/socket.js'

export type SessionContext = Means & {
  runs: Runs
  /** Undefined where the service has no peers. */
  cluster: Cluster | undefined
  intake: Intake
  log: FastifyBaseLogger
  /** The socket below the WebSocket. */
  stream: Socket
  /** Whether the client is on this host. */
  local: boolean
  /** Whose key the connection was opened with. */
  principal: Principal
  /** Of the bytes that all principals move. */
  rate: Rate
}

// A peer that was told to go gets this long to take the last frames before its socket is cut: with up to 32 MiB before
// them a busy one needs seconds, and one that is cut never learns why.
const GRACE_MS = 10_000

/** One connection: it takes frames in their order, and ends when it should. */
export class Session implements Connection, GradientSink {
  readonly #socket: WebSocket
  readonly #context: SessionContext
  readonly #sender: Sender
  readonly #answers: Answers
  readonly #reception: Reception
  readonly #ends: Ends
  readonly #gone = new AbortController()
  /** The run that this connection has opened; undefined before, and once the run is gone. */
  #joined: Joined | undefined
  /** Set where the connection has opened a whole. */
  #control: Control | undefined
  /** Memory that the client shares; undefined where all of its tensors come over the socket. */
  #arenas: SharedArenas | undefined
  readonly #news: News
  #inbox: { bytes: Uint8Array; binary: boolean }[] = []
  #pumping = false
  /** An `end` waits for those of other members: the socket is read until the next message has come. */
  #waitsForOthers = false
  /** Of the present turn of the event loop; undefined where it has brought no frame yet. */
  #slice: number | undefined
  #leaving = false
  #draining = false
  readonly #connectedAt = performance.now()
  readonly #window: Window
  readonly #small: SmallFrames
  readonly #room: Claim
  readonly #meter: Meter
  readonly #pauses: Pauses
  #timer: NodeJS.Timeout

  constructor(socket: WebSocket, context: SessionContext) {
    this.#socket = socket
    this.#context = context
    this.#meter = new Meter(context.principal.rate, context.rate)
    this.#pauses = new Pauses(socket)
    this.#sender = new Sender(socket)
    this.#answers = new Answers(context, this.#sender, (error) => this.#report(error))
    this.#reception = new Reception(context, {
      answers: this.#answers,
      gone: this.#gone.signal,
      refused: (error) => this.#report(error),
      checkOpen: (gradient) => this.#checkOpen(gradient),
      abandoned: () => this.#inPlace?.abandon(),
      shared: (bytes) => this.#spend(bytes),
      redirected: (destination) => this.#inPlace?.redirect(destination),
    })
    const [sender, answers, gone] = [this.#sender, this.#answers, this.#gone.signal]
    this.#ends = new Ends({ sender, answers, gone, report: (error) => this.#report(error) })
    this.#news = new News((members) => {
      if (!this.#leaving) this.#send({ type: 'members', members })
    })
    this.#window = new Window(context.config)
    this.#small = new SmallFrames(socket, () => this.#slowDown('small', () => this.#small.wait))
    this.#room = context.intake.enter({
      socket,
      stream: context.stream,
      isMember: () => this.#opened !== undefined,
      wait: () => this.#pauses.begin('room'),
      goOn: () => this.#pauses.end('room'),
    })
    if (this.#inPlace) this.#inPlace.sink = this
    socket.on('message', (data, binary) => this.#receive(data, binary))
    socket.on('error', (error) => this.#refuseMessage(error))
    socket.once('close', () => this.#closed())
    const { principal } = context
    const uses = [principal.connect(), principal.use(() => this.#checkAccess())]
    for (const release of uses) socket.once('close', release)
    const { send_timeout_seconds, open_timeout_seconds } = context.config
    this.#timer = setInterval(() => this.#checkProgress(), Math.min(send_timeout_seconds, open_timeout_seconds) * 250)
    this.#timer.unref()
  }

  /** Gradient bytes that this connection has under way, and update bytes that it has not sent. */
  get inFlightBytes(): number {
    return this.#reception.bytes + this.#answers.bytes
  }

  fence(): void {
    this.#context.metrics.takeovers_total.inc()
    this.#leave(4409, 'another connection has taken the run over')
  }

  expel(error: ServiceError): void {
    this.#joined = undefined
    this.#report(error)
  }

  /** Tells the client that the service shuts down; the connection ends with the step in flight. */
  drain(deadline_seconds: number): void {
    this.#draining = true
    this.#send({ type: 'draining', deadline_seconds })
    if (!this.#stepInFlight) this.#leave(1012, 'the service shuts down')
  }

  /** Where a gradient's next chunk goes. What has to wait, and whatever is wrong, goes the ordinary way. */
  destination(head: GradientHead): Uint8Array | undefined {
    if (this.#pumping || this.#leaving) return undefined
    if (this.#joined) this.#reception.prepare(this.#joined, head)
    return this.#reception.destination(head)
  }

  received(head: GradientHead): void {
    this.#spend(head.dataLength)
    this.#reception.received(head)
  }

  /** The run or the whole that it has opened. */
  get #opened(): string | undefined {
    return this.#joined?.run.name ?? this.#control?.run
  }

  get #stepInFlight(): boolean {
    if (this.#control) return this.#control.busy
    return this.#reception.label !== undefined || this.#answers.busy || (this.#joined?.run.begun ?? false)
  }

  #receive(data: RawData, binary: boolean): void {
    const unread = unreadProblem(this.#socket.bufferedAmount)
    if (unread) this.#report(unread)
    this.#room.arrived()
    if (this.#leaving) return this.#room.handled(false)
    assert(Buffer.isBuffer(data), 'ws gives a Buffer in its default mode; fragments were joined by it')
    this.#spend(data.length)
    this.#inbox.push({ bytes: data, binary })
    if (!this.#pumping) void this.#pump()
    /* c8 ignore next -- it depends on what comes together with a frame that waits */ else if (this.#waitsForOthers)
      this.#pauses.begin('frames')
  }

  /**
   * Handles what was received in its order. The socket is not read while a frame has to wait for something, or for
   * others to have the event loop.
   */
  async #pump(): Promise<void> {
    this.#pumping = true
    for (let message = this.#inbox.shift(); message && !this.#leaving; message = this.#inbox.shift()) {
      let isRefused = false
      try {
        const waits = this.#handle(message.bytes, message.binary)
        if (waits === undefined && performance.now() < this.#sliceEnd) continue
        if (!this.#waitsForOthers || this.#inbox.length > 0) this.#pauses.begin('frames')
        await (waits ?? turn())
      } catch (error) {
        isRefused = this.#opened === undefined
        this.#report(error)
      } finally {
        this.#room.handled(isRefused)
      }
    }
    this.#pumping = false
    this.#pauses.end('frames')
  }

  /** Does not read a connection that sends more than it may until it has waited for long enough. */
  #slowDown(reason: 'small' | 'rate', wait: () => number): void {
    if (!this.#leaving) this.#pauses.until(reason, wait)
  }

  /**
   * When this connection has had enough of the present turn of the event loop, by performance.now(). One turn may bring
   * many reads, each of many frames.
   */
  get #sliceEnd(): number {
    if (this.#slice === undefined) {
      this.#slice = sliceEnd()
      setImmediate(() => {
        this.#slice = undefined
      })
    }
    return this.#slice
  }

  /** Counts what has come against the bytes a second of its key, and of all. */
  #spend(bytes: number): void {
    this.#meter.spend(bytes)
    if (this.#meter.wait() > 0) this.#slowDown('rate', () => this.#meter.wait())
  }

  #handle(bytes: Uint8Array, binary: boolean): Promise<void> | undefined {
    if (!binary)
      throw new ServiceError('FRAME_MALFORMED', 'a text message: send every frame as a binary message', { close: 1003 })
    const frame = this.#decode(bytes)
    if (!(frame instanceof Promise)) return this.#take(frame)
    return frame.then((decoded) => (this.#leaving ? undefined : this.#take(decoded)))
  }

  #take(frame: ClientFrame): Promise<void> | undefined {
    const { label } = this.#reception
    if (label !== undefined && frame.type !== 'gradient')
      throw new ServiceError('FRAME_UNEXPECTED', `a frame '${frame.type}' while ${label} is incomplete`)
    if (frame.type !== 'gradient') this.#reception.forgetDropped()
    if (frame.type === 'open') return this.#open(frame)
    if (this.#control) return void this.#control.take(frame)
    const joined = this.#joined
    if (!joined) throw new ServiceError('FRAME_UNEXPECTED', `a frame '${frame.type}' before a successful open`)
    return this.#dispatch(joined, frame)
  }

  // After `open` only a `step` frame can be refused by its bytes without ending the connection.
  #decode(bytes: Uint8Array): ClientFrame | Promise<ClientFrame> {
    const refused = (error: unknown) => {
      this.#joined?.run.intake.refuseAnnouncement(this.#joined.member)
      throw error
    }
    try {
      const frame = inSlices(decodingClientFrame(bytes, this.#context.config))
      return frame instanceof Promise ? frame.catch(refused) : frame
    } catch (error) {
      return refused(error)
    }
  }

  #dispatch(joined: Joined, frame: Exclude<ClientFrame, OpenFrame>): Promise<void> | undefined {
    switch (frame.type) {
      case 'step':
        return void joined.run.intake.announce(joined.member, frame)
      case 'gradient':
        return this.#reception.take(joined, frame)
      case 'gradients':
        if (this.#arenas) return this.#reception.takeShared(joined, frame, this.#arenas)
        throw new ServiceError('FRAME_UNEXPECTED', "a frame 'gradients' on a connection that shares no memory")
      case 'end':
        return this.#end(joined, frame)
      case 'checkpoint':
        return this.#checkpoint(joined, frame)
    }
  }

  async #open(frame: OpenFrame): Promise<void> {
    if (this.#opened !== undefined)
      throw new ServiceError('FRAME_UNEXPECTED', `this connection has opened run '${this.#opened}' already`)
    const way = await openFrame(frame, this, this.#context)
    if (way.kind === 'moved') return this.#send(way.frame)
    if (way.kind === 'whole') return this.#openedWhole(way.opened)
    await this.#openedRun(frame, way.opened)
  }

  async #openedRun(frame: OpenFrame, { run, member, resumed }: Opened): Promise<void> {
    if (this.#leaving) return run.intake.detach(member)
    this.#joined = { run, member }
    const transport = this.#agree(frame, this.#joined)
    const opened = {
      type: 'opened',
      ...run.opened(resumed, member),
      ...transport,
      ...aboutService(this.#context),
    } as const
    this.#news.forget()
    if (frame.parameters) this.#send(opened)
    else void this.#sender.send({ header: await inSlices(encodingOpened(opened, run.describeParameters())) })
    this.#news.begin()
  }

  #openedWhole(opened: OpenedWhole): void {
    /* c8 ignore next -- it ended while the run was made, which is quick */
    if (this.#leaving) return
    const { principal } = this.#context
    this.#control = new Control(opened, {
      send: (frame) => this.#send(frame),
      report: (error) => this.#report(error),
      checkCheckpoint: () => principal.demand('checkpoint', "a frame 'checkpoint'"),
      ended: () => this.#draining && this.#leave(1012, 'the service shuts down'),
    })
    this.#send({ type: 'placed', ...opened.placement, resumed: opened.resumed, ...aboutService(this.#context) })
  }

  /** The key's grants have changed: a connection that may not go on is closed. */
  #checkAccess(): void {
    const refusal = accessLost(this.#context.principal, this.#opened)
    if (refusal) this.#report(refusal)
  }

  changed(status: MemberStatus): void {
    this.#news.add(status)
  }

  /** The transport as `opened` has it; nothing where the client has offered none. */
  #agree({ transport }: OpenFrame, joined: Joined): { transport?: TransportAnswer } {
    if (!transport) return {}
    const { device, metrics, local } = this.#context
    const { arenas, answer } = agree(transport, { device, ...joined, local })
    this.#arenas = arenas
    metrics.transports_total.inc({ kind: answer.kind })
    return { transport: answer }
  }

  /** Resolves once the next step may begin; what becomes of the checkpoint is told when it is on the disk. */
  async #checkpoint({ run }: Joined, { tag }: CheckpointFrame): Promise<void> {
    this.#context.principal.demand('checkpoint', "a frame 'checkpoint'")
    const { written } = await beginCheckpoint(this.#context.runs, run, { tag, busy: this.#answers.busy })
    written.then(
      ({ checkpoint, step, digest, bytes }) => this.#send({ type: 'checkpointed', checkpoint, step, digest, bytes }),
      (error) => this.#report(error),
    )
  }

  #checkOpen(gradient: { parameter: number; step: number }): void {
    if (!this.#context.runs.draining || this.#stepInFlight) return
    throw new ServiceError('DRAINING', 'the service shuts down and begins no step', { ...gradient, close: 1012 })
  }

  async #end(joined: Joined, frame: EndFrame): Promise<void> {
    // Of a socket that is not read nobody sees the end, and others may wait for the member for hours.
    this.#waitsForOthers = joined.run.intake.gathers
    if (this.#waitsForOthers && this.#inbox.length === 0) this.#pauses.end('frames')
    const isEnded = await this.#ends.take(joined, frame).finally(() => {
      this.#waitsForOthers = false
    })
    if (isEnded && this.#draining) this.#leave(1012, 'the service shuts down')
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
    else log.info({ event: 'refused', code: known.code, reason: known.message, run: this.#joined?.run.name })
    metrics.errors_total.inc({ code: known.code })
    this.#joined?.run.refused(refusalOf(known, this.#joined.member))
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

  /** Closes the connection and cuts it where the peer does not take the close. */
  #leave(code: number, reason: string): void {
    if (this.#leaving) return
    this.#leaving = true
    this.#inbox = []
    if (code === 4409) this.#sender.drop()
    this.#reception.abandon()
    this.#gone.abort()
    this.#socket.close(code, reason)
    this.#socket.resume()
    // A closed socket is let go of at once: a timer that still knew it would keep 128 KiB of read buffers.
    const cut = setTimeout(() => this.#socket.terminate(), GRACE_MS).unref()
    this.#socket.once('close', () => clearTimeout(cut))
  }

  #closed(): void {
    clearInterval(this.#timer)
    this.#leaving = true
    this.#reception.abandon()
    this.#gone.abort()
    this.#joined?.run.intake.detach(this.#joined.member)
    this.#control?.close()
    this.#arenas?.close()
  }

  get #inPlace(): InPlaceWebSocket | undefined {
    /* c8 ignore next -- the server makes no others */
    return this.#socket instanceof InPlaceWebSocket ? this.#socket : undefined
  }

  /** Closes a connection that neither takes what waits for it nor sends the rest of what it began. */
  #checkProgress(): void {
    const now = performance.now()
    const { stream, config } = this.#context
    // Whoever is made to wait is not slow.
    const begun = Math.min(this.#reception.startedAt ?? Infinity, this.#sender.busySince ?? Infinity)
    /* c8 ignore next -- the check may come while a rate is kept to */
    const since = this.#pauses.has('rate') ? Infinity : begun
    // A client may send a whole step before it reads: both directions count.
    const refusal = this.#window.check(now, {
      since,
      bytes: stream.bytesRead - this.#small.controlBytes + bytesTaken(stream),
    })
    if (refusal) return this.#report(refusal)
    const { open_timeout_seconds } = config
    if (this.#opened !== undefined || this.#pumping || now - this.#connectedAt <= open_timeout_seconds * 1000) return
    const message = `nothing was opened within ${open_timeout_seconds} seconds`
    if (!this.#pauses.has('room')) return this.#report(new ServiceError('FRAME_UNEXPECTED', message))
    const wait = `${message}: a message of ${this.#room.wanted} bytes has waited for others`
    this.#report(new ServiceError('OVERLOADED', wait, { retry_after_seconds: 1 }))
  }
}
