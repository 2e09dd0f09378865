import type { IncomingMessage } from 'node:http'
import { ERRORS, type ErrorCode } from '../errors.js'
import type { ErrorFrame } from '../wire/frame.js'
import { type ClientErrorCode, MuondError, type MuondErrorFields } from './error.js'

/** The error that an error frame carries; the service's word on `retryable` counts, not the table's. */
export function frameError(frame: ErrorFrame, more: MuondErrorFields = {}): MuondError {
  const { type, code, message, status, retryable, ...fields } = frame
  return new MuondError(code, message, { ...fields, ...more }, { status, retryable })
}

/** Close codes that say more than that the connection is gone; the others are met with a new connection. */
const CLOSE_CODES: Readonly<Record<number, ClientErrorCode>> = {
  1002: 'FRAME_MALFORMED',
  1003: 'FRAME_MALFORMED',
  1009: 'FRAME_TOO_LARGE',
  1011: 'INTERNAL',
  4409: 'TAKEN_OVER',
}

export function closeError(code: number, reason: string): MuondError {
  const why = `the service closed the connection with code ${code}${reason && `: ${reason}`}`
  return new MuondError(CLOSE_CODES[code] ?? 'CONNECTION_LOST', why)
}

/** Statuses of an upgrade refused by something that does not speak problem+json, such as a proxy. */
const STATUS_CODES: Readonly<Record<number, ClientErrorCode>> = {
  401: 'UNAUTHORIZED',
  403: 'FORBIDDEN',
  404: 'NOT_FOUND',
  429: 'OVERLOADED',
}

/** The error of an upgrade that was answered with an ordinary HTTP response. */
export async function refusedUpgrade(response: IncomingMessage): Promise<MuondError> {
  const status = Number(response.statusCode)
  const problem = parseProblem(await readText(response))
  const code = problem.code ?? STATUS_CODES[status] ?? (status < 500 ? 'REQUEST_INVALID' : 'CONNECTION_LOST')
  const seconds = Number(response.headers['retry-after'])
  const fields = seconds > 0 ? { retry_after_seconds: seconds } : {}
  const message = problem.detail ?? `the service refused the connection with HTTP status ${status}`
  return new MuondError(code, message, fields, { status })
}

/** A problem is a few lines; what goes beyond is not one. */
const PROBLEM_CHARACTERS = 1 << 16

async function readText(response: IncomingMessage): Promise<string> {
  let text = ''
  response.setEncoding('utf8')
  for await (const part of response) {
    text += part
    if (text.length > PROBLEM_CHARACTERS) break
  }
  return text
}

/** RFC 9457: `detail` for people, `code` is the service's own member. */
function parseProblem(text: string): { code?: ErrorCode; detail?: string } {
  const problem = parseJson(text)
  if (typeof problem !== 'object' || problem === null) return {}
  const code = 'code' in problem && isErrorCode(problem.code) ? { code: problem.code } : {}
  const detail = 'detail' in problem && typeof problem.detail === 'string' ? { detail: problem.detail } : {}
  return { ...code, ...detail }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    // A body that is not JSON has nothing to add to the status.
    return undefined
  }
}

function isErrorCode(value: unknown): value is ErrorCode {
  return typeof value === 'string' && Object.hasOwn(ERRORS, value)
}
