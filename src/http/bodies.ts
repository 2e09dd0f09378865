import { Ajv, type ValidateFunction } from 'ajv'
import type { FastifyInstance, FastifyRequest } from 'fastify'

// Paths and queries are text, whatever they mean. A body says itself what is a number.
// The contract's lint holds its schemas against their meta-schema: to do so again takes 30 ms of every start.
const COERCING = new Ajv({ coerceTypes: true, useDefaults: true, strict: false, validateSchema: false })
const EXACT = new Ajv({ useDefaults: true, strict: false, validateSchema: false, validateFormats: false })

/** Names of headers come in small letters. */
export function validatorOf(schema: object, part = ''): ValidateFunction {
  if (part === 'body') return EXACT.compile(schema)
  if (part !== 'headers') return COERCING.compile(schema)
  const properties = Object.entries(Reflect.get(schema, 'properties')).map(
    ([name, of]) => [name.toLowerCase(), of] as const,
  )
  return COERCING.compile({ ...schema, properties: Object.fromEntries(properties) })
}

/** What a coded body is of is not known before it was decoded, and nobody here does that. */
export async function refuseEncodings({ headers }: FastifyRequest): Promise<void> {
  const coding = headers['content-encoding'] ?? 'identity'
  if (coding === 'identity') return
  const message = `the body has Content-Encoding ${coding}, expected none: send the bytes as they are`
  throw Object.assign(new Error(message), { statusCode: 415 })
}

/**
 * State and gradients come as streams of any length: their handlers read them, and hold them against what the run can
 * have. Plain text is no body of any operation.
 */
export function takeBodies(scope: FastifyInstance): void {
  scope.removeContentTypeParser('text/plain')
  scope.addContentTypeParser('application/octet-stream', (request, payload, done) => {
    if (request.routeOptions.config.streamed) return done(null, payload)
    done(
      Object.assign(new Error('Content-Type is application/octet-stream, expected application/json'), {
        statusCode: 415,
      }),
    )
  })
}
