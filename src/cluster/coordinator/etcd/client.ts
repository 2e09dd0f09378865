import type { RequestOptions } from 'node:https'
import { errorText } from '../../../errors.js'
import { requestJson } from '../json-request.js'

/** Codes of gRPC, which the gateway puts beside the status of HTTP. */
const UNAVAILABLE = 14
const UNAUTHENTICATED = 16
/**
 * etcd says so for a token that has expired or that it has forgotten in a restart, with code 16 or 3 by its version.
 */
const INVALID_TOKEN = /invalid auth token/

export type EtcdOptions = {
  /** Origins of the members, such as http://10.0.0.1:2379. */
  readonly urls: readonly string[]
  readonly tls: RequestOptions
  /** A user of etcd, where it asks for one. */
  readonly user: { readonly name: string; readonly password: string } | undefined
  readonly timeout_ms: number
}

/** etcd has refused a request. */
export class EtcdError extends Error {
  override readonly name = 'EtcdError'
  readonly code: number

  constructor(code: number, message: string) {
    super(message)
    this.code = code
  }
}

/**
 * etcd v3 over its JSON gateway (`/v3/…`, from etcd 3.4 on), as https://etcd.io/docs/v3.5/dev-guide/api_grpc_gateway
 * has it: keys and values in base64, numbers of 64 bits as text, and what is zero or false left out. The members are
 * asked in turn until one answers, from the one that answered last: so a request may be carried out twice, and every
 * request here is one of which the second does no harm.
 */
export class EtcdClient {
  readonly #options: EtcdOptions
  #member = 0
  #token: string | undefined

  constructor(options: EtcdOptions) {
    this.#options = options
  }

  async call(path: string, body: object): Promise<Record<string, unknown>> {
    const { user } = this.#options
    if (user === undefined) return this.#callAny(path, body)
    this.#token ??= await this.#authenticate(user)
    try {
      return await this.#callAny(path, body)
    } catch (error) {
      if (!isOfToken(error)) throw error
      this.#token = await this.#authenticate(user)
      return this.#callAny(path, body)
    }
  }

  async #authenticate(user: { name: string; password: string }): Promise<string> {
    this.#token = undefined
    const { token } = await this.#callAny('/v3/auth/authenticate', user)
    return String(token)
  }

  async #callAny(path: string, body: object): Promise<Record<string, unknown>> {
    const { urls } = this.#options
    const failures: string[] = []
    while (failures.length < urls.length) {
      const url = urls[this.#member % urls.length]
      try {
        return await this.#callOne(new URL(path, url), body)
      } catch (error) {
        if (error instanceof EtcdError && error.code !== UNAVAILABLE) throw error
        failures.push(`${url}: ${errorText(error)}`)
        this.#member++
      }
    }
    throw new Error(failures.join('; '))
  }

  async #callOne(url: URL, body: object): Promise<Record<string, unknown>> {
    const { tls, timeout_ms } = this.#options
    const headers = this.#token === undefined ? undefined : { authorization: this.#token }
    const answer = await requestJson({ url, method: 'POST', body, tls, timeout_ms, ...(headers && { headers }) })
    const fields: Record<string, unknown> = Object(answer.body)
    if (answer.status === 200) return fields
    // etcd 3.4 has its words in `error`, later ones in `message`.
    const { code, message = fields.error } = fields
    throw new EtcdError(Number(code), `${url.pathname} answers ${answer.status}: ${message}`)
  }
}

function isOfToken(error: unknown): boolean {
  return error instanceof EtcdError && (error.code === UNAUTHENTICATED || INVALID_TOKEN.test(error.message))
}
