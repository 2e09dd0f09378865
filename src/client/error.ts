import { ERRORS, type ErrorCode, type ErrorFields } from '../errors.js'

/** What only a client can meet; everything else has the service's own code, whoever found it first. */
const CLIENT_ERRORS = {
  /** The connection could not be made or was lost, and every retry was used up. */
  CONNECTION_LOST: { retryable: true },
  /** Another client opened this run with `takeover`: this one no longer writes it. */
  TAKEN_OVER: { retryable: false },
  CLIENT_CLOSED: { retryable: false },
} as const

export type ClientErrorCode = ErrorCode | keyof typeof CLIENT_ERRORS

export type MuondErrorFields = ErrorFields & {
  /** Names of every parameter whose gradient was refused in this step: what `skipped` may list next time. */
  refused?: readonly string[]
}

type Origin = { cause?: unknown; retryable?: boolean; status?: number }

/**
 * Everything the client rejects with, except an AbortSignal's own reason. `status` is the HTTP status of the same
 * error, where it has one.
 */
export class MuondError extends Error {
  readonly code: ClientErrorCode
  readonly status: number | undefined
  readonly retryable: boolean
  readonly fields: MuondErrorFields

  constructor(code: ClientErrorCode, message: string, fields: MuondErrorFields = {}, origin: Origin = {}) {
    super(message, origin.cause === undefined ? {} : { cause: origin.cause })
    // A newer service may know more codes than this client; an error frame says the same two things itself.
    const row: { status?: number; retryable: boolean } = { ...ERRORS, ...CLIENT_ERRORS }[code]
    this.name = 'MuondError'
    this.code = code
    this.fields = fields
    this.status = origin.status ?? row.status
    this.retryable = origin.retryable ?? row.retryable
  }
}
