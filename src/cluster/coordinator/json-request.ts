import { request as httpRequest, type IncomingMessage } from 'node:http'
import { request as httpsRequest, type RequestOptions } from 'node:https'

/** An answer holds at most so many bytes; the largest is the list of all processes. */
const MOST_BYTES = 2 ** 25
const MOST_SHOWN = 200

export type JsonRequest = {
  readonly url: URL
  readonly method: 'GET' | 'POST' | 'PUT' | 'DELETE'
  readonly body?: unknown
  readonly headers?: Readonly<Record<string, string>>
  /**
   * Certificates, agent, and headers that show who asks. The global `fetch` takes neither an authority nor a
   * certificate of the client.
   */
  readonly tls?: RequestOptions
  readonly timeout_ms: number
}

/** Sends JSON and answers the status and the JSON that comes back. Throws where none comes in time. */
export async function requestJson(asked: JsonRequest): Promise<{ status: number; body: unknown }> {
  const signal = AbortSignal.timeout(asked.timeout_ms)
  try {
    const response = await responseOf(asked, signal)
    const text = await textOf(response)
    return { status: Number(response.statusCode), body: parsed(text, response.statusCode) }
  } catch (error) {
    if (signal.aborted) throw new Error(`${asked.url.origin} has not answered within ${asked.timeout_ms / 1000} s`)
    throw error
  }
}

function parsed(text: string, status: number | undefined): unknown {
  if (text === '') return undefined
  try {
    return JSON.parse(text)
  } catch {
    throw new Error(`it answers ${status} and no JSON: ${text.slice(0, MOST_SHOWN).trim()}`)
  }
}

function responseOf({ url, method, body, headers, tls }: JsonRequest, signal: AbortSignal): Promise<IncomingMessage> {
  const content = body === undefined ? undefined : JSON.stringify(body)
  const send = url.protocol === 'https:' ? httpsRequest : httpRequest
  // Node gives the body of a DELETE no length by itself, and without one it is not read.
  const length = content === undefined ? {} : { 'content-length': Buffer.byteLength(content) }
  const type = content === undefined ? {} : { 'content-type': 'application/json' }
  // A connection for each request: on one that is kept, a request may meet its end.
  const options = {
    agent: false,
    ...tls,
    method,
    signal,
    headers: { accept: 'application/json', ...type, ...length, ...tls?.headers, ...headers },
  }
  return new Promise((resolve, reject) => {
    send(url, options, resolve).on('error', reject).end(content)
  })
}

async function textOf(response: IncomingMessage): Promise<string> {
  const pieces: Buffer[] = []
  let bytes = 0
  for await (const piece of response) {
    pieces.push(piece)
    bytes += piece.length
    if (bytes > MOST_BYTES) throw new Error(`an answer has more than ${MOST_BYTES} bytes`)
  }
  return Buffer.concat(pieces).toString()
}
