/**
 * Every error a client can meet, for REST (RFC 9457 problem+json) and the stream alike.
 * `close` is the WebSocket close code that follows the error frame; without it the connection stays open.
 */
export const ERRORS = {
  UNAUTHORIZED: { status: 401, close: 1008, retryable: false },
  FORBIDDEN: { status: 403, retryable: false },
  NOT_FOUND: { status: 404, retryable: false },
  REQUEST_INVALID: { status: 400, retryable: false },
  PROTOCOL_UNSUPPORTED: { status: 400, close: 1002, retryable: false },
  RUN_NOT_FOUND: { status: 404, retryable: false },
  RUN_EXISTS: { status: 409, retryable: false },
  RUN_BUSY: { status: 409, retryable: true },
  RUN_MISMATCH: { status: 409, retryable: false },
  FRAME_MALFORMED: { status: 400, close: 1002, retryable: false },
  FRAME_UNEXPECTED: { status: 400, close: 1002, retryable: false },
  FRAME_TOO_LARGE: { status: 413, close: 1009, retryable: false },
  PARAMETER_INVALID: { status: 422, retryable: false },
  PARAMETER_UNKNOWN: { status: 404, retryable: false },
  SHAPE_MISMATCH: { status: 422, retryable: false },
  DTYPE_UNSUPPORTED: { status: 422, retryable: false },
  HYPERPARAMETER_INVALID: { status: 422, retryable: false },
  STATE_INVALID: { status: 422, retryable: false },
  GRADIENT_NOT_FINITE: { status: 422, retryable: false },
  MAX_LOGITS_INVALID: { status: 422, retryable: false },
  STEP_CONFLICT: { status: 409, retryable: false },
  STEP_INCOMPLETE: { status: 409, retryable: false },
  STALE_GENERATION: { status: 409, retryable: false },
  PEER_FAILED: { status: 503, retryable: true },
  RANGE_MISSING: { status: 409, retryable: true },
  QUORUM_LOST: { status: 503, retryable: true },
  OVER_CAPACITY: { status: 507, retryable: false },
  OVERLOADED: { status: 429, close: 1013, retryable: true },
  DRAINING: { status: 503, retryable: true },
  RESTORING: { status: 503, retryable: true },
  DEVICE_FAILED: { status: 503, retryable: true },
  STORAGE_FAILED: { status: 507, retryable: true },
  COORDINATOR_FAILED: { status: 503, retryable: true },
  CHECKPOINT_UNREADABLE: { status: 500, retryable: false },
  INTERNAL: { status: 500, close: 1011, retryable: false },
} as const satisfies Record<string, { status: number; close?: number; retryable: boolean }>

export type ErrorCode = keyof typeof ERRORS

/**
 * The keys that an error frame may have beside its code and message: indexes, steps from 1, seconds. `left_out`: a step
 * was closed without this replica, which gets the updates and the receipt of the step with its `end`.
 */
export type ErrorFields = {
  parameter?: number
  step?: number
  expected_step?: number
  retry_after_seconds?: number
  left_out?: boolean
}

/**
 * An error that a client is told. The message names the thing and both values; `close` and `status` override the
 * table's.
 */
export class ServiceError extends Error {
  readonly code: ErrorCode
  readonly fields: ErrorFields
  readonly close: number | undefined
  readonly status: number

  constructor(code: ErrorCode, message: string, fields: ErrorFields & { close?: number; status?: number } = {}) {
    super(message)
    this.name = 'ServiceError'
    const { close, status, ...rest } = fields
    const row: { status: number; close?: number } = ERRORS[code]
    this.code = code
    this.fields = rest
    this.close = close ?? row.close
    this.status = status ?? row.status
  }

  get retryable(): boolean {
    return ERRORS[this.code].retryable
  }
}

/** The message of an error without the name of its class. */
export function errorText(error: unknown): string {
  return String(error).replace(/^\w*Error: /, '')
}

/** The message of what an error was caused by, or else its own: that of `fetch` says no more than that it failed. */
export function causeText(error: unknown): string {
  return errorText(Reflect.get(Object(error), 'cause') ?? error)
}
