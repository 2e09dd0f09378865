import swagger from '@fastify/swagger'
import swaggerUi from '@fastify/swagger-ui'
import type { FastifyInstance } from 'fastify'
import type { Contract } from './contract.js'

// Swagger UI styles its elements inline and draws its icons from data URLs; everything else comes from the service itself.
const CONTENT_SECURITY_POLICY =
  "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"

/** The contract as a page under `/docs`. It is open to everybody: it shows what this repository shows, and a browser cannot send a key for it. */
export async function docs(scope: FastifyInstance, { document }: Contract): Promise<void> {
  scope.addHook('onRoute', (route) => {
    route.config = { ...route.config, access: 'open' }
  })
  await scope.register(swagger, { mode: 'static', specification: { document } })
  await scope.register(swaggerUi, { routePrefix: '/docs', staticCSP: CONTENT_SECURITY_POLICY })
}
