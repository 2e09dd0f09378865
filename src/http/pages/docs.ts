import swagger from '@fastify/swagger'
import swaggerUi from '@fastify/swagger-ui'
import type { FastifyInstance } from 'fastify'
import type { Contract } from '../contract.js'

// Swagger UI styles its elements inline and has its icons in data URLs; all else is the service's own.
const CONTENT_SECURITY_POLICY =
  "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"

/**
 * Serves the contract as a page under `/docs`. It needs no key: a browser cannot send one for a page, and the
 * contract is no secret.
 */
export async function docs(scope: FastifyInstance, { document }: Contract): Promise<void> {
  scope.addHook('onRoute', (route) => {
    route.config = { ...route.config, access: 'open' }
  })
  await scope.register(swagger, { mode: 'static', specification: { document } })
  await scope.register(swaggerUi, { routePrefix: '/docs', staticCSP: CONTENT_SECURITY_POLICY })
}
