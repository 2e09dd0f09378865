import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { request as httpRequest, type IncomingMessage, type RequestOptions } from 'node:http'
import { request as httpsRequest } from 'node:https'
import { ConfigError, type Environment, type Flags } from '../config.js'
import { errorText } from '../errors.js'

/** A service as a command reaches it. */
export type Service = { url: string; token: string | undefined }

const DEFAULT_URL = 'http://127.0.0.1:8787'

/**
 * What `--url` says, with the key in the file of `--token-file` or in the variable MUOND_TOKEN: command lines can be read by all.
 * Throws ConfigError for what is no URL, and for a file that cannot be read.
 */
export function serviceOf(flags: Flags, { MUOND_TOKEN }: Environment): Service {
  const { url = DEFAULT_URL, 'token-file': file } = flags
  if (!/^https?:\/\//.test(String(url)) || !URL.canParse(String(url)))
    throw new ConfigError(`--url is '${url}', expected one such as ${DEFAULT_URL}`)
  return { url: String(url).replace(/\/+$/, ''), token: typeof file === 'string' ? tokenOf(file) : MUOND_TOKEN }
}

function tokenOf(file: string): string {
  try {
    return readFileSync(file, 'utf8').trim()
  } catch (error) {
    throw new ConfigError(`--token-file: ${errorText(error)}`)
  }
}

/** The JSON that a path answers. Throws ConfigError with what the service says. */
export async function getJson<T>(service: Service, path: string): Promise<T> {
  const { response, end } = await answered(service, path, { method: 'GET' })
  end()
  return JSON.parse(await textOf(await response))
}

/** The body that a path answers, as it comes, and its length. Throws ConfigError. */
export async function getStream(service: Service, path: string): Promise<{ body: IncomingMessage; bytes: number }> {
  const { response, end } = await answered(service, path, { method: 'GET' })
  end()
  const body = await response
  return { body, bytes: Number(body.headers['content-length']) }
}

/** Sends a body of a known length, and stops sending where it is answered before its end. Throws ConfigError. */
export async function putStream<T>(
  service: Service,
  path: string,
  { bytes, pieces }: { bytes: number; pieces: AsyncIterable<Uint8Array> },
): Promise<T> {
  const headers = {
    ...{ 'content-type': 'application/octet-stream', 'content-length': bytes },
    // A service that may keep the connection reads on behind a refusal. If it closed it, bytes on their way would cost the answer.
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

async function answered({ url, token }: Service, path: string, options: RequestOptions) {
  const target = new URL(`${url}${path}`)
  const request = target.protocol === 'https:' ? httpsRequest : httpRequest
  const headers = { ...options.headers, ...(token && { authorization: `Bearer ${token}` }) }
  const outgoing = request(target, { ...options, headers, agent: false })
  const response = new Promise<IncomingMessage>((resolve, reject) => {
    outgoing.once('response', resolve)
    outgoing.on('error', (error) => reject(new ConfigError(`${url} cannot be reached: ${reason(error)}`)))
  }).then(refused(url))
  response.catch(() => {})
  return { outgoing, response, end: () => void outgoing.end() }
}

/** A refusal is a problem document; what it says is what the person is told. */
function refused(url: string): (response: IncomingMessage) => Promise<IncomingMessage> {
  return async (response) => {
    const { statusCode = 0 } = response
    if (statusCode >= 200 && statusCode < 300) return response
    const text = await textOf(response)
    throw new ConfigError(`${url} answers ${statusCode}: ${detailOf(text)}`)
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

/** node tells of all the addresses that it has tried in an error of several errors. */
function reason(error: Error): string {
  /* c8 ignore next -- whether a name has several addresses depends on the machine */
  return error instanceof AggregateError ? errorText(error.errors[0]) : errorText(error)
}
