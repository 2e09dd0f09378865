import { setMaxListeners } from 'node:events'
import { Connection, type Endpoint, UNIX } from './connection.js'
import { MuondError } from './error.js'
import { type OpenOptions, openRun, type Run } from './run.js'
import { BACKOFF, type Backoff } from './steps/backoff.js'
import { TRANSPORTS, type TransportKind } from './transport/transport.js'

export type { AttentionDeclaration } from '../wire/frame.js'
export { type ClientErrorCode, MuondError, type MuondErrorFields } from './error.js'
export { RECEIPTS_KEPT } from './receipts.js'
export { type Described, NAME_RULES, type NameRule, type Route } from './routing.js'
export type { Checkpointed, EndOptions, Gradients, OpenOptions, Receipt, Run } from './run.js'
export type { Weights } from './steps/apply.js'
export type { Backoff } from './steps/backoff.js'
export type { Bound, Gradient, Parameter } from './steps/parameter.js'
export type { StepOptions } from './steps/step.js'
export { type Suggested, type Suggestion, type SuggestOptions, suggest } from './suggest.js'
export type { TransportKind } from './transport/transport.js'

export type ConnectOptions = {
  /** The key, sent as `Authorization: Bearer`; default: the variable MUOND_TOKEN. */
  token?: string
  /** Ends the client: whatever is in flight rejects with the signal's reason. */
  signal?: AbortSignal
  /** Consecutive failed attempts at one step that brought nothing new, before it rejects; default 8, 0 for none. */
  retries?: number
  /** Waits between attempts; default 0.1 s, doubling to 10 s, half of it random. */
  backoff?: Partial<Backoff>
  /** Most bytes of a gradient in one message; default: what the service allows. */
  chunk_bytes?: number
  /**
   * How gradients and updates travel: `shm` is memory that the service shares (Linux, on its own host), `websocket` the
   * connection, `auto` (default) shared memory where the address is a loopback one and the service takes it.
   */
  transport?: TransportKind
  /** Options of the `ws` package, such as `ca` or `rejectUnauthorized`. */
  socket?: Endpoint['socket']
}

const RETRIES = 8

/**
 * Connects to a service: `connect('ws://127.0.0.1:8080')`, or `connect('ws+unix:///run/muond.sock')` for a Unix socket;
 * a URL without a path means `/v1/stream`.
 * @throws MuondError UNAUTHORIZED, FORBIDDEN, CONNECTION_LOST…; the first connection is not retried. The signal's
 *   reason if aborted
 */
export async function connect(url: string | URL, options: ConnectOptions = {}): Promise<Client> {
  const client = new Client(streamUrl(url), options)
  await client.ready()
  return client
}

/** A service, as one trainer uses it. Each open run has a connection of its own. */
export class Client {
  readonly #endpoint: Endpoint
  readonly #options: ConnectOptions
  readonly #stop = new AbortController()
  readonly #signal: AbortSignal
  readonly #connections = new Set<Connection>()
  /** Connected and not yet used: the first run's. */
  #idle: Connection | undefined

  /** Use `connect`. */
  constructor(url: URL, options: ConnectOptions) {
    const { token = process.env.MUOND_TOKEN, socket, signal, chunk_bytes = 1 } = options
    if (!Number.isInteger(chunk_bytes) || chunk_bytes < 1)
      throw new RangeError(`chunk_bytes is ${chunk_bytes}, at least 1`)
    const { transport = 'auto' } = options
    if (!TRANSPORTS.includes(transport))
      throw new RangeError(`transport is ${JSON.stringify(transport)}, expected one of ${TRANSPORTS.join(', ')}`)
    this.#endpoint = { url, token, socket }
    this.#options = options
    this.#signal = AbortSignal.any(signal === undefined ? [this.#stop.signal] : [this.#stop.signal, signal])
    // Every run of the client listens.
    setMaxListeners(0, this.#signal)
  }

  /** Connects, which shows that the address and the token are right. */
  async ready(): Promise<void> {
    this.#idle = await this.#dial(this.#signal)
  }

  /**
   * Opens a run; its updates will be applied to each parameter's `data`, in place.
   * @throws MuondError RUN_EXISTS, RUN_NOT_FOUND, RUN_BUSY (see `takeover`), RUN_MISMATCH, PARAMETER_INVALID…
   */
  open(options: OpenOptions): Promise<Run> {
    const { retries = RETRIES, backoff, chunk_bytes = Number.MAX_SAFE_INTEGER, transport = 'auto' } = this.#options
    const host = {
      dial: (signal: AbortSignal, url?: URL) => this.#dial(signal, url),
      url: this.#endpoint.url,
      signal: this.#signal,
      retries,
      backoff: { ...BACKOFF, ...backoff },
      chunk_bytes,
      transport,
    }
    return openRun(host, options)
  }

  /** Closes every connection; steps in flight reject with CLIENT_CLOSED. The runs stay in the service. */
  async close(): Promise<void> {
    const reason = new MuondError('CLIENT_CLOSED', 'the client was closed')
    const closing = [...this.#connections].map((connection) => connection.close(reason))
    this.#stop.abort(reason)
    await Promise.all(closing)
  }

  /** `url` is of another process of the service. */
  async #dial(signal: AbortSignal, url?: URL): Promise<Connection> {
    const idle = url ? undefined : this.#idle
    if (idle) this.#idle = undefined
    if (idle !== undefined && idle.reason === undefined) return idle
    const endpoint = url ? { ...this.#endpoint, url } : this.#endpoint
    const connection = await Connection.open(endpoint, AbortSignal.any([this.#signal, signal]))
    this.#connections.add(connection)
    connection.closed.then(() => this.#connections.delete(connection))
    return connection
  }
}

function streamUrl(url: string | URL): URL {
  const stream = new URL(url)
  // Of `ws+unix:///path/of.sock` all is the socket's path, and what follows a colon the request's, as `ws` has it.
  if (stream.protocol === UNIX) return stream.pathname.includes(':') ? stream : new URL(`${stream.href}:/v1/stream`)
  if (stream.pathname === '/') stream.pathname = '/v1/stream'
  return stream
}
