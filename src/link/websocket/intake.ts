import type { Socket } from 'node:net'
import type { WebSocket } from 'ws'
import { ServiceError } from '../../errors.js'
import { encodeFrame } from '../../wire/codec.js'
import { MESSAGE_BYTES } from '../../wire/frame.js'
import { InPlaceWebSocket } from './socket.js'

// Whoever sends more slowly than this gives its room to those who wait for some.
const SLOW_BYTES_PER_SECOND = 2 ** 20
/** How long a rate is measured at least. */
const MEASURED_MS = 1000
const CHECK_MS = 250
// Reading a refused `open` takes up to a hundredth of a core at this rate, whoever sends them and over however many
// connections.
const REFUSED_BYTES_PER_SECOND = 4 * 2 ** 20

/** One connection, as those see it who share memory for large messages with it. */
export type Peer = {
  socket: WebSocket
  /** The socket below the WebSocket. */
  stream: Socket
  /** Whether it has opened a run. */
  isMember(): boolean
  /** It may not be read until `goOn`. */
  wait(): void
  goOn(): void
}

type Held = { bytes: number; byStranger: boolean; isArriving: boolean; measured: { bytes: number; at: number } }

/** What a connection has of the room for large messages: room for one message, or a place among those who wait. */
export class Claim {
  readonly peer: Peer
  held: Held | undefined
  /** Bytes that it waits for; 0 where it waits for none. */
  wanted = 0
  readonly #intake: Intake

  constructor(intake: Intake, peer: Peer) {
    this.#intake = intake
    this.peer = peer
  }

  /** Whether the message at whose beginning the connection is has room; else the connection waits for it. */
  admit(bytes: number): boolean {
    return this.#intake.admit(this, bytes)
  }

  /** The message has come to its end. */
  arrived(): void {
    if (this.held) this.held.isArriving = false
  }

  /** What was to be done with a message is done. `isRefused` says that it was an `open` that opened nothing. */
  handled(isRefused: boolean): void {
    this.#intake.release(this, isRefused)
  }
}

/**
 * Room for the large messages of all connections, from their first byte until they are handled. A message that finds
 * none is not read, and its connection waits for its turn: connections that have a run go first, and those that have
 * none (strangers) share half of the room. While somebody waits, a connection that sends too slowly is ended with
 * OVERLOADED and gives its room back, and strangers pay for an `open` that is refused with the time of all strangers.
 */
export class Intake {
  readonly #limit: number
  readonly #ended: (error: ServiceError) => void
  readonly #claims = new Set<Claim>()
  readonly #waiting = new Set<Claim>()
  /** Strangers get no room before this, by performance.now(). */
  #strangersFrom = 0
  #timer: NodeJS.Timeout | undefined

  /** `limit`: bytes of room; `ended` hears of every connection that was ended. */
  constructor(limit: number, ended: (error: ServiceError) => void) {
    this.#limit = limit
    this.#ended = ended
  }

  /** Bytes of the room that are taken. */
  get bytes(): number {
    return this.#sum(() => true)
  }

  /** Takes a connection in; what it has is given back when it closes. */
  enter(peer: Peer): Claim {
    const claim = new Claim(this, peer)
    const { socket, stream } = peer
    this.#claims.add(claim)
    if (socket instanceof InPlaceWebSocket && socket.inPlace) socket.admit = (bytes) => claim.admit(bytes)
    // ws listens too, and before: it has taken out what was complete.
    else stream.on('data', () => this.#grow(claim, keptBytes(socket)))
    socket.once('close', () => this.#leave(claim))
    return claim
  }

  admit(claim: Claim, bytes: number): boolean {
    if (claim.held) return true
    claim.wanted = bytes
    if (!this.#isAhead(claim) && this.#fits(claim)) {
      this.#hold(claim)
      return true
    }
    this.#waiting.add(claim)
    claim.peer.wait()
    this.#timer ??= setInterval(() => this.#check(), CHECK_MS).unref()
    return false
  }

  release(claim: Claim, isRefused: boolean): void {
    const { held } = claim
    if (!held || held.isArriving) return
    claim.held = undefined
    if (isRefused && held.byStranger) {
      const from = Math.max(this.#strangersFrom, performance.now())
      this.#strangersFrom = from + (held.bytes / REFUSED_BYTES_PER_SECOND) * 1000
    }
    this.#serve()
  }

  #leave(claim: Claim): void {
    this.#claims.delete(claim)
    this.#waiting.delete(claim)
    claim.held = undefined
    this.#serve()
  }

  #hold(claim: Claim): void {
    const measured = { bytes: claim.peer.stream.bytesRead, at: performance.now() }
    claim.held = { bytes: claim.wanted, byStranger: !claim.peer.isMember(), isArriving: true, measured }
    claim.wanted = 0
  }

  /** The first in line: members before strangers. */
  get #next(): Claim | undefined {
    const waiting = [...this.#waiting]
    return waiting.find(({ peer }) => peer.isMember()) ?? waiting[0]
  }

  /** Whether somebody waits who comes before one that begins to wait. */
  #isAhead({ peer }: Claim): boolean {
    return [...this.#waiting].some((other) => other.peer.isMember() || !peer.isMember())
  }

  #fits(claim: Claim): boolean {
    return this.#hasRoom(claim) && (claim.peer.isMember() || performance.now() >= this.#strangersFrom)
  }

  #hasRoom({ wanted, peer }: Claim): boolean {
    if (this.bytes + wanted > this.#limit) return false
    const most = Math.max(this.#limit / 2, MESSAGE_BYTES)
    return peer.isMember() || this.#sum(({ byStranger }) => byStranger) + wanted <= most
  }

  #sum(counts: (held: Held) => boolean): number {
    let sum = 0
    for (const { held } of this.#claims) if (held && counts(held)) sum += held.bytes
    return sum
  }

  /** Gives room to whoever waits, in their order. */
  #serve(): void {
    for (let next = this.#next; next && this.#fits(next); next = this.#next) {
      this.#waiting.delete(next)
      this.#hold(next)
      next.peer.goOn()
    }
    if (this.#waiting.size > 0) return
    clearInterval(this.#timer)
    this.#timer = undefined
  }

  /** Ends those who send too slowly, until the first in line has room. */
  #check(): void {
    const now = performance.now()
    for (const claim of this.#claims) {
      const next = this.#next
      if (!next || this.#hasRoom(next)) break
      const isInTheWay = claim.held?.byStranger || next.peer.isMember()
      if (isInTheWay && isSlow(claim, now)) this.#end(claim, 'sends too slowly while others wait')
    }
    this.#serve()
  }

  #end(claim: Claim, why: string): void {
    const { socket, stream } = claim.peer
    /* c8 ignore next -- only those that hold room are ended */
    const bytes = claim.held?.bytes ?? 0
    const message = `large messages take ${this.bytes} bytes, at most ${this.#limit}, and a connection with ${bytes} of them ${why}`
    const error = new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 })
    const { code, status, retryable, fields } = error
    stream.removeAllListeners('data')
    this.#leave(claim)
    socket.send(encodeFrame({ type: 'error', code, message, status, retryable, ...fields }))
    socket.close(error.close, code)
    // Its memory must be free before the next connection grows: nothing more is read, not even the answer to the close.
    stream.destroySoon()
    this.#ended(error)
  }

  /** A socket that is not read in place cannot wait at the beginning of a message: it is ended in the middle of it. */
  #grow(claim: Claim, bytes: number): void {
    claim.held = undefined
    claim.wanted = bytes
    const hasRoom = this.#hasRoom(claim)
    this.#hold(claim)
    if (!hasRoom) this.#end(claim, 'found no room')
    else if (bytes === 0) this.#serve()
  }
}

/** Whether too little of a message has come since this was last asked, and long enough ago to tell. */
function isSlow({ held, peer }: Claim, now: number): boolean {
  if (!held?.isArriving) return false
  const { at, bytes } = held.measured
  if (now - at < MEASURED_MS) return false
  held.measured = { bytes: peer.stream.bytesRead, at: now }
  return held.measured.bytes - bytes < ((now - at) / 1000) * SLOW_BYTES_PER_SECOND
}

// A piece of a message is a Buffer of its own, which takes so much beside its bytes, with what the collector has not
// taken back yet.
const PIECE_BYTES = 1024

/**
 * What ws' receiver holds back: pieces of the present frame, and the frames of a message before it (ws 8,
 * lib/receiver.js).
 */
function keptBytes(socket: WebSocket): number {
  const receiver: object = Reflect.get(socket, '_receiver')
  const [pieces, frames]: unknown[][] = [Reflect.get(receiver, '_buffers'), Reflect.get(receiver, '_fragments')]
  const bytes: number = Reflect.get(receiver, '_bufferedBytes') + Reflect.get(receiver, '_messageLength')
  return bytes + (pieces.length + frames.length) * PIECE_BYTES
}
