import type { FastifyRequest } from 'fastify'
import type { Refusals } from '../access/refusals.js'
import { ServiceError } from '../errors.js'

/**
 * Makes OVERLOADED of the refusals of an address that has had too many: of a key that is none, and of any upgrade that
 * may not be. Each address is logged once a minute.
 */
export function refusalLimit(refusals: Refusals): (error: unknown, request: FastifyRequest) => unknown {
  return (error, { ws, log, raw: { socket } }) => {
    if (!(error instanceof ServiceError)) return error
    const counts = error.code === 'UNAUTHORIZED' || (ws && error.code === 'FORBIDDEN')
    if (!counts) return error
    // A Unix socket has no address: all who may connect to it are one user.
    const address = socket.remoteAddress ?? ''
    const { count, most, wait_seconds } = refusals.count(address)
    if (wait_seconds === 0) return error
    if (count === most + 1) log.warn({ event: 'refusals_limited', address, code: error.code, count })
    const message = `${count} requests of this address were refused within a minute, at most ${most} are answered`
    return new ServiceError('OVERLOADED', message, { retry_after_seconds: wait_seconds })
  }
}
