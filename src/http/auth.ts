import { createHash, timingSafeEqual } from 'node:crypto'
import type { FastifyRequest } from 'fastify'
import type { Config } from '../config.js'
import { ServiceError } from '../errors.js'

/** The key that a route asks for: none, one that may read, or one that may do everything. */
export type Access = 'open' | 'read' | 'write'

declare module 'fastify' {
  interface FastifyContextConfig {
    access?: Access
    /** Whether the route is the stream. */
    upgradable?: boolean
    /** Whether the handler reads the body itself, as it comes. */
    streamed?: boolean
    /** Whether the answer ends only with its client. */
    endless?: boolean
  }
}

/**
 * The subprotocol that the service chooses. Who offers a key as another one offers this too, as keys are not echoed.
 */
export const SUBPROTOCOL = 'muond.v1'
const KEY_SUBPROTOCOL = 'bearer.'

/**
 * The onRequest hook that refuses requests without the right key, upgrades included. A route that declares no access,
 * an unknown one too, asks for a key that reads. Throws UNAUTHORIZED or FORBIDDEN.
 */
export function authenticator({
  api_keys,
  read_keys,
}: Pick<Config, 'api_keys' | 'read_keys'>): (request: FastifyRequest) => Promise<void> {
  const writers = api_keys.map(hash)
  const readers = read_keys.map(hash)
  const open = writers.length + readers.length === 0
  return async (request) => {
    const { access = 'read' } = request.routeOptions.config
    if (open || access === 'open') return
    const key = keyOf(request)
    if (key === undefined) throw new ServiceError('UNAUTHORIZED', 'a key is needed: `Authorization: Bearer <key>`')
    const hashed = hash(key)
    if (matches(writers, hashed)) return
    if (!matches(readers, hashed)) throw new ServiceError('UNAUTHORIZED', 'this key is not known')
    if (access === 'write')
      throw new ServiceError('FORBIDDEN', `this key may only read, not ${request.method} ${request.routeOptions.url}`)
  }
}

/**
 * Chooses the subprotocol of an upgrade from those offered. Clients drop a connection for which none of those offered
 * is chosen.
 */
export function chooseSubprotocol(offered: ReadonlySet<string>): string | false {
  return offered.has(SUBPROTOCOL) && SUBPROTOCOL
}

function keyOf({ headers }: FastifyRequest): string | undefined {
  const [, key] = /^Bearer +([^ ]+)$/i.exec(headers.authorization ?? '') ?? []
  return key ?? subprotocolKey(headers['sec-websocket-protocol'])
}

function subprotocolKey(offered = ''): string | undefined {
  const names = offered.split(',').map((name) => name.trim())
  return names.find((name) => name.startsWith(KEY_SUBPROTOCOL))?.slice(KEY_SUBPROTOCOL.length)
}

/** Hashes a key: digests have one length, which timingSafeEqual needs, and tell nothing of the key's length. */
function hash(key: string): Buffer {
  return createHash('sha256').update(key).digest()
}

/** Compares with every key, so that the time does not tell which one matched. */
function matches(keys: readonly Buffer[], candidate: Buffer): boolean {
  return keys.reduce((found, key) => timingSafeEqual(key, candidate) || found, false)
}
