import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { Agent as HttpAgent, request as httpRequest, type IncomingMessage, type RequestOptions } from 'node:http'
import { Agent as HttpsAgent, request as httpsRequest } from 'node:https'
import { ConfigError, type Environment, type Flags } from '../config.js'
import { errorText } from '../errors.js'

/**
 * How a command reaches a service: its URL or that of a Unix socket, without a slash at the end, a bearer key, and the
 * agent that keeps its connections; without one each request has a connection of its own.
 */
export type ServiceAddress = { url: string; token: string | undefined; agent?: HttpAgent }

/** A service has refused a request, in the words of its answer. */
export class AnswerError extends ConfigError {
  readonly status: number
  /** The words of the answer alone. */
  readonly detail: string

  constructor(url: string, status: number, detail: string) {
    super(`${url} answers ${status}: ${detail}`)
    this.status = status
    this.detail = detail
  }
}

const DEFAULT_URL = 'http://127.0.0.1:8787'
const MOST_CONNECTIONS = 4
const SILENCE_MS = 10_000
/** A Unix socket: its absolute path, and behind a colon the path of a request, which clients may give. */
const UNIX_URL = /^(?:ws|http)\+unix:\/\/(\/[^:]+)(?::\/.*)?$/

/**
 * What `--url` says, with the key in the file of `--token-file` or in the variable MUOND_TOKEN: command lines can be
 * read by all. `what` names the URL in messages. Throws ConfigError for what is no URL, and for a file that cannot be
 * read.
 */
export function serviceOf(flags: Flags, { MUOND_TOKEN }: Environment, what = '--url'): ServiceAddress {
  const { url: given = DEFAULT_URL, 'token-file': file } = flags
  // Trainers name the service by the URL of its stream.
  const url = String(given).replace(/^ws(s?):\/\/(.*?)(?:\/v1\/stream)?$/, 'http$1://$2')
  const isHttp = /^https?:\/\//.test(url) && URL.canParse(url)
  if (!isHttp && !UNIX_URL.test(url))
    throw new ConfigError(`${what} is '${given}', expected one such as ${DEFAULT_URL} or ws+unix:///run/muond.sock`)
  return { url: url.replace(/\/+$/, ''), token: typeof file === 'string' ? tokenOf(file) : MUOND_TOKEN }
}

function tokenOf(file: string): string {
  try {
    return readFileSync(file, 'utf8').trim()
  } catch (error) {
    throw new ConfigError(`--token-file: ${errorText(error)}`)
  }
}

/** The same service, over few connections that are kept until `close`. */
export function keepConnections(service: ServiceAddress): ServiceAddress & { close(): void } {
  const options = { keepAlive: true, maxSockets: MOST_CONNECTIONS }
  const agent = service.url.startsWith('https:') ? new HttpsAgent(options) : new HttpAgent(options)
  return { ...service, agent, close: () => agent.destroy() }
}

/**
 * The text of an answer to GET, and the time of the service in milliseconds since 1970, to the second. Throws
 * AnswerError where the service refuses, and ConfigError where it cannot be reached or is silent for 10 seconds.
 */
export async function getText(service: ServiceAddress, path: string): Promise<{ text: string; date: number }> {
  const { outgoing, response, end } = await answered(service, path, { method: 'GET', timeout: SILENCE_MS })
  /* c8 ignore next -- takes the 10 seconds */
  outgoing.once('timeout', () => outgoing.destroy(new Error(`no answer within ${SILENCE_MS / 1000} seconds`)))
  end()
  const { headers } = await response
  return { text: await textOf(await response), date: Date.parse(String(headers.date)) }
}

/** The JSON of an answer to GET. Throws ConfigError with the service's own words where it refuses. */
export async function getJson<T>(service: ServiceAddress, path: string): Promise<T> {
  const { response, end } = await answered(service, path, { method: 'GET' })
  end()
  return JSON.parse(await textOf(await response))
}

/** The body of an answer to GET, as a stream, and its length in bytes. Throws ConfigError as `getJson`. */
export async function getStream(
  service: ServiceAddress,
  path: string,
): Promise<{ body: IncomingMessage; bytes: number }> {
  const { response, end } = await answered(service, path, { method: 'GET' })
  end()
  const body = await response
  return { body, bytes: Number(body.headers['content-length']) }
}

/** Sends a body of `bytes` bytes with PUT, and stops where the service answers before its end. Throws as `getJson`. */
export async function putStream<T>(
  service: ServiceAddress,
  path: string,
  { bytes, pieces }: { bytes: number; pieces: AsyncIterable<Uint8Array> },
): Promise<T> {
  const headers = {
    ...{ 'content-type': 'application/octet-stream', 'content-length': bytes },
    // With keep-alive a service that refuses reads on. If it closed the connection, bytes that still arrive there would
    // reset it, and the answer would be lost.
    connection: 'keep-alive',
  }
  const { outgoing, response, end } = await answered(service, path, { method: 'PUT', headers })
  const gone = new AbortController()
  const over = () => gone.abort()
  outgoing.once('response', over).once('close', over)
  try {
    for await (const piece of pieces) {
      if (gone.signal.aborted) break
      if (!outgoing.write(piece)) await once(outgoing, 'drain', { signal: gone.signal }).catch(() => undefined)
    }
    if (!gone.signal.aborted) end()
    return JSON.parse(await textOf(await response))
  } finally {
    outgoing.destroy()
  }
}

async function answered({ url, token, agent }: ServiceAddress, path: string, options: RequestOptions) {
  const [, socketPath] = UNIX_URL.exec(url) ?? []
  const target = new URL(`${socketPath === undefined ? url : 'http://localhost'}${path}`)
  const request = target.protocol === 'https:' ? httpsRequest : httpRequest
  const headers = { ...options.headers, ...(token && { authorization: `Bearer ${token}` }) }
  const outgoing = request(target, { ...options, headers, agent: agent ?? false, socketPath })
  const response = new Promise<IncomingMessage>((resolve, reject) => {
    outgoing.once('response', resolve)
    outgoing.on('error', (error) => reject(new ConfigError(`${url} cannot be reached: ${reason(error)}`)))
  }).then(refused(url))
  response.catch(() => {})
  return { outgoing, response, end: () => void outgoing.end() }
}

/** Passes an answer of success on. Throws AnswerError with the detail of any other, which is a problem document. */
function refused(url: string): (response: IncomingMessage) => Promise<IncomingMessage> {
  return async (response) => {
    const { statusCode = 0 } = response
    if (statusCode >= 200 && statusCode < 300) return response
    const text = await textOf(response)
    throw new AnswerError(url, statusCode, detailOf(text))
  }
}

function detailOf(text: string): string {
  try {
    const { code, detail } = JSON.parse(text)
    return `${detail} (${code})`
  } catch {
    return text.slice(0, 200) || 'nothing'
  }
}

async function textOf(response: IncomingMessage): Promise<string> {
  return Buffer.concat(await response.toArray()).toString()
}

/** The message of a failed connection. node puts those of several addresses into one error: the first is taken. */
function reason(error: Error): string {
  /* c8 ignore next -- whether a name has several addresses depends on the machine */
  return error instanceof AggregateError ? errorText(error.errors[0]) : errorText(error)
}
