import { STATUS_CODES } from 'node:http'
import type { Duplex } from 'node:stream'
import type { FastifyError, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { type ErrorCode, ServiceError } from '../errors.js'
import type { Metrics } from '../metrics.js'
import type { components } from './openapi.js'

export type Problem = components['schemas']['Problem']

const MEDIA_TYPE = 'application/problem+json'

/**
 * Answers every error of the app with a problem document (RFC 9457): our own, fastify's, and unknown routes. `limited`
 * may make another error of it.
 */
export function answerProblems(
  app: FastifyInstance,
  metrics: Metrics,
  limited: (error: unknown, request: FastifyRequest) => unknown,
): void {
  app.setErrorHandler((error, request, reply) => sendProblem(limited(error, request), { request, reply, metrics }))
  app.setNotFoundHandler((request) => {
    throw new ServiceError('NOT_FOUND', `there is no ${path(request)} here`)
  })
}

/** Answers with the problem document of an error. One of status 500 or above is logged; a bug's message is not sent. */
export function sendProblem(
  error: unknown,
  { request, reply, metrics }: { request: FastifyRequest; reply: FastifyReply; metrics: Metrics },
): void {
  const problem = problemOf(error, request.id)
  metrics.errors_total.inc({ code: problem.code })
  if (problem.status >= 500) request.log.error({ event: 'request_failed', code: problem.code, err: error })
  if (problem.status === 401) reply.header('www-authenticate', 'Bearer')
  if (problem.retry_after_seconds !== undefined) reply.header('retry-after', Math.ceil(problem.retry_after_seconds))
  // The client's next bytes on this connection are frames for the stream that was refused: no request follows.
  if (request.headers.upgrade !== undefined) reply.raw.once('finish', () => request.raw.socket.destroySoon())
  reply.code(problem.status).type(MEDIA_TYPE).serializer(JSON.stringify).send(problem)
}

/** The problem document of an error. A bug is INTERNAL without its message; the request's `id` finds it in the log. */
export function problemOf(error: unknown, id: string): Problem {
  if (error instanceof ServiceError)
    return { ...document(error.code, error.message, error.status), retryable: error.retryable, ...error.fields }
  const status = statusOf(error)
  if (status < 500 && error instanceof Error) return document('REQUEST_INVALID', explain(error), status)
  return document('INTERNAL', `the service failed; its log says why under request ${id}`, 500)
}

/** Answers bytes that are no HTTP request or no WebSocket handshake. fastify has no reply for them, only the socket. */
export function answerClientError(error: NodeJS.ErrnoException, socket: Duplex): void {
  if (error.code === 'ECONNRESET' || !socket.writable) return void socket.destroy()
  const status = CLIENT_ERRORS[error.code ?? ''] ?? 400
  const body = JSON.stringify(document('REQUEST_INVALID', `the request was not understood: ${error.message}`, status))
  const head = [
    `HTTP/1.1 ${status} ${STATUS_CODES[status]}`,
    `content-type: ${MEDIA_TYPE}`,
    `content-length: ${Buffer.byteLength(body)}`,
    'connection: close',
  ]
  socket.end(`${head.join('\r\n')}\r\n\r\n${body}`)
}

/** The status of those errors of node:http that are not 400. */
const CLIENT_ERRORS: Readonly<Record<string, number>> = { HPE_HEADER_OVERFLOW: 431, ERR_HTTP_REQUEST_TIMEOUT: 408 }

function document(code: ErrorCode, detail: string, status: number): Problem {
  return { type: 'about:blank', title: STATUS_CODES[status] ?? 'Error', status, detail, code, retryable: false }
}

function statusOf(error: unknown): number {
  return error instanceof Error && 'statusCode' in error && typeof error.statusCode === 'number'
    ? error.statusCode
    : 500
}

/** fastify's message, and where the contract knows no such key the place and its name. */
function explain(error: Error & Partial<Pick<FastifyError, 'validation' | 'validationContext' | 'code'>>): string {
  if (error.code === 'FST_ERR_CTP_INVALID_MEDIA_TYPE')
    return `${error.message}, expected application/json, or application/octet-stream for state and gradients`
  const [first] = error.validation ?? []
  const unknown = first?.params.additionalProperty
  if (unknown === undefined) return error.message
  return error.validationContext === 'body'
    ? `unknown key '${unknown}' in the body`
    : `unknown query parameter '${unknown}'`
}

function path({ method, url }: FastifyRequest): string {
  return `${method} ${url.split('?')[0]}`
}
