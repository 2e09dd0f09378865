import type { MovedFrame, OpenedFrame, OpenFrame, PlacedFrame } from '../../wire/frame.js'
import { type Connection, whileIdle } from '../connection.js'
import { MuondError } from '../error.js'
import type { Handshake, Placing } from '../transport/transport.js'

/** What a run needs from the client that opened it. */
export type Dial = {
  /** A new connection, to the client's own address or another one, which ends with this signal or with the client. */
  dial: (signal: AbortSignal, url?: URL) => Promise<Connection>
  /** The client's own address. */
  url: URL
}

type Answer = OpenedFrame | MovedFrame | PlacedFrame

/** From one process to the next: one that does not know the head of a run knows which one does. */
const MOST_MOVES = 4

/** Opens a run over a new connection, whichever process the answer comes from. */
async function ask(connection: Connection, frame: OpenFrame): Promise<Answer> {
  try {
    return await new Promise<Answer>((resolve, reject) => {
      connection.onFrame = (answer) => {
        if (answer.type !== 'opened' && answer.type !== 'moved' && answer.type !== 'placed') return whileIdle(answer)
        connection.rest()
        resolve(answer)
      }
      connection.onClosed = reject
      connection.send(frame).catch(reject)
    })
  } catch (error) {
    connection.fail(error)
    throw error
  }
}

/** Opens a run that is in one process over a new connection. */
export async function handshake(connection: Connection, frame: OpenFrame): Promise<Handshake> {
  const answer = await ask(connection, frame)
  if (answer.type === 'opened') return { connection, opened: answer }
  throw misplaced(connection, `the service sent ${answer.type}, expected opened`)
}

/** The way to the process that opens a run: it remembers where the service has sent it. */
export class Route {
  readonly #host: Dial
  #url: URL | undefined

  constructor(host: Dial) {
    this.#host = host
  }

  /** Opens a run of one process, or of several. @throws MuondError */
  async open(frame: OpenFrame, signal: AbortSignal): Promise<Handshake | Placing> {
    for (let moves = 0; ; moves++) {
      const connection = await this.#dial(signal)
      const answer = await ask(connection, frame)
      if (answer.type === 'opened') return { connection, opened: answer }
      if (answer.type === 'placed') return { connection, placed: answer }
      const error = misplaced(connection, `run '${frame.run}' was moved ${moves + 1} times, now to ${answer.url}`)
      if (moves === MOST_MOVES) throw error
      this.#url = followed(answer.url, this.#host.url)
    }
    /* c8 ignore next -- the loop ends with return or throw */
  }

  /** Where the service has named a process there may be none any more: then it is asked again. */
  async #dial(signal: AbortSignal): Promise<Connection> {
    const url = this.#url
    this.#url = undefined
    const connection = await this.#host.dial(signal, url)
    this.#url = url
    return connection
  }
}

/**
 * An address that the service has named. @throws MuondError FORBIDDEN where it would take the key along without TLS
 */
export function followed(url: string, own: URL): URL {
  if (!URL.canParse(url) || !/^wss?:/.test(url))
    throw new MuondError('FRAME_MALFORMED', `the service names '${url}' as the address of a stream`)
  const named = new URL(url)
  if (own.protocol !== 'wss:' || named.protocol === 'wss:') return named
  throw new MuondError('FORBIDDEN', `the service has TLS and names ${url}, which has not: the key does not go there`)
}

function misplaced(connection: Connection, what: string): MuondError {
  const error = new MuondError('FRAME_UNEXPECTED', what)
  connection.fail(error)
  return error
}
