import type { FastifyRequest } from 'fastify'
import type { Config } from '../config.js'
import { ServiceError } from '../errors.js'

/** The entry of a list that lets everything pass. */
const ANY = '*'
const LOOPBACK_NAMES = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\])$/

/**
 * The onRequest hook that refuses what a web page sends on behalf of somebody who only looks at it. A browser names
 * the page in `Origin`: pages of another origin must be listed. A page whose own name was made to lead here (DNS
 * rebinding) is of the same origin, but its `Host` is no name of this service. Upgrades are held to both, as browsers
 * open WebSockets to any origin. Throws FORBIDDEN.
 */
export function originGuard({
  host,
  allowed_hosts,
  allowed_origins,
}: Pick<Config, 'host' | 'allowed_hosts' | 'allowed_origins'>): (request: FastifyRequest) => Promise<void> {
  const names = new Set([...allowed_hosts.map((name) => name.toLowerCase()), host.toLowerCase(), `[${host}]`])
  const origins = new Set(allowed_origins.map((origin) => origin.toLowerCase()))
  return async ({ headers, socket }) => {
    const { host: authority = '', origin } = headers
    if (!knowsHost(names, nameOf(authority), socket.localAddress)) {
      throw new ServiceError(
        'FORBIDDEN',
        `the Host '${authority}' is none of this service, which --allowed-hosts can list`,
      )
    }
    if (origin === undefined || origins.has(ANY) || origins.has(origin.toLowerCase())) return
    if (hostOf(origin) === authority.toLowerCase()) return
    throw new ServiceError(
      'FORBIDDEN',
      `pages of the origin '${origin}' may not use this service unless --allowed-origins lists it`,
    )
  }
}

/** No browser leaves Host out, so what has none is not a page's request. */
function knowsHost(names: ReadonlySet<string>, name: string, localAddress = ''): boolean {
  if (name === '' || names.has(ANY) || names.has(name) || LOOPBACK_NAMES.test(name)) return true
  // A service on 0.0.0.0 is known by each address on which a connection reaches it.
  return name === localAddress.replace(/^::ffff:/, '') || name === `[${localAddress}]`
}

/** The name or address in a Host header, without its port. */
function nameOf(authority: string): string {
  return authority.replace(/:\d*$/, '').toLowerCase()
}

/** Host and port of an origin; undefined for `null`, the origin of files and of sandboxed frames. */
function hostOf(origin: string): string | undefined {
  return URL.canParse(origin) ? new URL(origin).host : undefined
}
