import type { FastifyReply, FastifyRequest } from 'fastify'
import type { Keys } from '../access/keys.js'
import type { Power, Principal } from '../access/principal.js'
import type { Wholes } from '../cluster/head/wholes.js'
import { ServiceError } from '../errors.js'
import type { Runs } from '../keep/runs.js'

/** What a route asks for: nothing, or a key, which has the scope and, where it says so, all runs. */
export type Access = 'open' | { readonly scope?: Power; readonly allRuns?: boolean }

declare module 'fastify' {
  interface FastifyContextConfig {
    access?: Access
    /** Whether the route is the stream. */
    upgradable?: boolean
    /** Whether the handler reads the body itself, as it comes. */
    streamed?: boolean
    /** Whether it is for runs that are spread over several processes, too. */
    wholes?: boolean
    /** Whether the answer ends only with its client. */
    endless?: boolean
  }
  interface FastifyRequest {
    /** Who asks; null on routes that are open to all. */
    principal: Principal | null
  }
}

/**
 * The subprotocol that the service chooses. Who offers a key as another one offers this too, as keys are not echoed.
 */
export const SUBPROTOCOL = 'muond.v1'
const KEY_SUBPROTOCOL = 'bearer.'

/**
 * The onRequest hook that finds out who asks, and refuses what that key may not do, upgrades included. A route that
 * declares nothing, an unknown one too, asks for any key. Throws UNAUTHORIZED or FORBIDDEN.
 */
export function authenticator(keys: Keys): (request: FastifyRequest, reply: FastifyReply) => Promise<void> {
  return async (request, reply) => {
    const { access = {} } = request.routeOptions.config
    if (access === 'open') return
    const principal = principalOf(keys, request)
    request.principal = principal
    const { method, routeOptions } = request
    const check = () => checkAccess(principal, access, asked(method, routeOptions.url))
    check()
    // The stream looks after itself.
    if (!request.ws) endWithAccess(principal, { check, run: runOf(request) }, reply)
  }
}

/**
 * The preHandler hook that answers a request about a run that is not the principal's, and one about a run that does
 * not exist, with the same words: nobody learns the names of others. Throws RUN_NOT_FOUND.
 */
export function runGuard(runs: Runs, wholes?: Wholes): (request: FastifyRequest) => Promise<void> {
  return async (request) => {
    const run = runOf(request)
    if (run === undefined) return
    const isWhole = wholes?.has(run) ?? false
    if (!(principalIn(request).sees(run) && (isWhole || runs.has(run)))) throw runs.absent(run)
    const { method, routeOptions } = request
    if (isWhole && !routeOptions.config.wholes) throw ofShards(asked(method, routeOptions.url), run)
  }
}

/** What is asked of a whole that has no tensors here. */
function ofShards(what: string, run: string): ServiceError {
  const remedy = `GET /v1/runs/${run}/shards says where they are`
  return new ServiceError(
    'NOT_FOUND',
    `${what}: run '${run}' is spread over several processes, ask for its shards (${remedy})`,
  )
}

/** Whoever sent a request to a route that takes a key. */
export function principalIn({ principal, routeOptions }: FastifyRequest): Principal {
  if (principal !== null) return principal
  /* c8 ignore start -- a bug: every route about runs takes a key */
  throw new Error(`${routeOptions.url} is open to all, and has no principal`)
}
/* c8 ignore stop */

/**
 * Chooses the subprotocol of an upgrade from those offered. Clients drop a connection for which none of those offered
 * is chosen.
 */
export function chooseSubprotocol(offered: ReadonlySet<string>): string | false {
  return offered.has(SUBPROTOCOL) && SUBPROTOCOL
}

function principalOf(keys: Keys, request: FastifyRequest): Principal {
  const key = keyOf(request)
  // Where there are no keys any other one is as good as none: it may be that of a proxy in front.
  if (keys.everybody) return (key !== undefined && keys.find(key)) || keys.everybody
  if (key === undefined) throw new ServiceError('UNAUTHORIZED', 'a key is needed: `Authorization: Bearer <key>`')
  const principal = keys.find(key)
  if (principal !== undefined) return principal
  throw new ServiceError('UNAUTHORIZED', 'this key is not known')
}

/** What a request asks for, with the path as the contract has it. */
function asked(method: string, route = ''): string {
  return `${method} ${route.replace(/:(\w+)/g, '{$1}')}`
}

/** A route that is not there asks for nothing more than a key. */
function checkAccess(principal: Principal, { scope, allRuns }: Exclude<Access, 'open'>, what: string): void {
  if (scope !== undefined) principal.demand(scope, what)
  if (allRuns) principal.demandAllRuns(what)
}

/** Cuts the connection of a request that is under way when its key is removed, or may not do this any more. */
function endWithAccess(
  principal: Principal,
  { check, run }: { check: () => void; run: string | undefined },
  { raw }: FastifyReply,
): void {
  const done = principal.use(() => {
    try {
      check()
      /* c8 ignore next -- what takes long enough for that is about a run */
      if (run === undefined || principal.sees(run)) return
    } catch {
      // Its answer may have begun: only the connection can say that it is over.
    }
    raw.destroy()
  })
  raw.once('close', done)
}

function runOf({ params }: FastifyRequest): string | undefined {
  const run: unknown = Reflect.get(Object(params), 'run')
  return typeof run === 'string' ? run : undefined
}

function keyOf({ headers }: FastifyRequest): string | undefined {
  const [, key] = /^Bearer +([^ ]+)$/i.exec(headers.authorization ?? '') ?? []
  return key ?? subprotocolKey(headers['sec-websocket-protocol'])
}

function subprotocolKey(offered = ''): string | undefined {
  const names = offered.split(',').map((name) => name.trim())
  return names.find((name) => name.startsWith(KEY_SUBPROTOCOL))?.slice(KEY_SUBPROTOCOL.length)
}
