import type { ErrorFields, ServiceError } from '../errors.js'
import type { ErrorFrame } from '../wire/frame.js'

/** What a client is told of an error. */
export function errorFrame(error: ServiceError): ErrorFrame {
  const { code, message, status, retryable } = error
  const fields: ErrorFields = error.fields
  return { type: 'error', code, message, status, retryable, ...fields }
}
