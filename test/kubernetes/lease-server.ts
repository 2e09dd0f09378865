import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { createServer, type Server } from 'node:https'
import type { AddressInfo } from 'node:net'
import { resolve } from 'node:path'
import type { Lease } from '../../src/cluster/coordinator/kubernetes/client.js'

const file = (name: string) => resolve('test/golden/tls', name)
const TLS = { key: readFileSync(file('server.key')), cert: readFileSync(file('server.pem')) }
const PATH = /^\/apis\/coordination\.k8s\.io\/v1\/namespaces\/([^/]+)\/leases(?:\/([^/]+))?$/
const MICRO_TIME = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$/
const MOST_ANNOTATIONS = 2 ** 18
const REASONS: Readonly<Record<number, string>> = {
  400: 'BadRequest',
  401: 'Unauthorized',
  403: 'Forbidden',
  404: 'NotFound',
  409: 'Conflict',
  422: 'Invalid',
}

type Answer = { readonly status: number; readonly body: object }
type Asked = { readonly namespace: string; readonly name: string | undefined; readonly query: URLSearchParams }

export const ADMIN = 'admin-token'
export const STRANGER = 'stranger-token'

/**
 * Leases as the API of Kubernetes has them, without Kubernetes, whose build takes too long for CI. It is no source of what
 * the API does: contract.json has what a real one answered, and both are held to it.
 */
export class LeaseServer {
  readonly ca = file('ca.pem')
  readonly port: number
  readonly #leases = new Map<string, Lease>()
  #version = 0
  #server: Server

  static async start(): Promise<LeaseServer> {
    const server = createServer(TLS).listen(0, '127.0.0.1')
    await once(server, 'listening')
    return new LeaseServer(server)
  }

  private constructor(server: Server) {
    this.#server = server
    this.port = (server.address() as AddressInfo).port
    this.#serve()
  }

  async kill(): Promise<void> {
    const closed = once(this.#server, 'close')
    this.#server.close()
    this.#server.closeAllConnections()
    await closed
  }

  /** Starts it again, with the Leases that it had. */
  async start(): Promise<void> {
    this.#server = createServer(TLS).listen(this.port, '127.0.0.1')
    await once(this.#server, 'listening')
    this.#serve()
  }

  #serve(): void {
    this.#server.on('request', async (request: IncomingMessage, response: ServerResponse) => {
      const pieces: Buffer[] = []
      for await (const piece of request) pieces.push(piece)
      const text = Buffer.concat(pieces).toString()
      const { status, body } = this.#answer(request, text === '' ? {} : JSON.parse(text))
      response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body))
    })
  }

  #answer({ method, url, headers }: IncomingMessage, body: object): Answer {
    if (headers.authorization === `Bearer ${STRANGER}`) return failure(403)
    if (headers.authorization !== `Bearer ${ADMIN}`) return failure(401)
    const { pathname, searchParams } = new URL(url!, 'https://127.0.0.1')
    const [, namespace, name] = PATH.exec(pathname)!
    const asked = { namespace, name, query: searchParams }
    if (method === 'GET') return name === undefined ? this.#list(asked) : this.#get(asked)
    if (method === 'DELETE') return this.#remove(asked, body)
    return method === 'POST' ? this.#create(namespace, body as Lease) : this.#replace(namespace, body as Lease)
  }

  #get({ namespace, name }: Asked): Answer {
    const lease = this.#leases.get(`${namespace}/${name}`)
    return lease ? { status: 200, body: lease } : failure(404)
  }

  #list({ namespace, query }: Asked): Answer {
    const [label, value] = query.get('labelSelector')!.split('=')
    const items = [...this.#leases]
      .filter(([key, { metadata }]) => key.startsWith(`${namespace}/`) && metadata.labels?.[label] === value)
      .map(([, { metadata, spec }]) => ({ metadata, spec }))
    return { status: 200, body: { kind: 'LeaseList', items } }
  }

  #create(namespace: string, lease: Lease): Answer {
    const problem = problemOf(lease)
    if (problem !== undefined) return failure(problem)
    if (this.#leases.has(`${namespace}/${lease.metadata.name}`)) return failure(409, 'AlreadyExists')
    return { status: 201, body: this.#keep(namespace, lease, randomUUID()) }
  }

  #replace(namespace: string, lease: Lease): Answer {
    const { name, uid, resourceVersion } = lease.metadata
    const found = this.#leases.get(`${namespace}/${name}`)?.metadata
    if (uid !== undefined && uid !== found?.uid) return failure(409)
    // As a Lease is made by PUT, too, its version is not looked at where there is none.
    if (found === undefined) return this.#create(namespace, lease)
    if (resourceVersion === undefined) return failure(422)
    if (!/^\d+$/.test(resourceVersion)) return failure(500)
    if (resourceVersion !== found.resourceVersion) return failure(409)
    return { status: 200, body: this.#keep(namespace, lease, found.uid!) }
  }

  #remove({ namespace, name }: Asked, body: { preconditions?: Partial<Lease['metadata']> }): Answer {
    const key = `${namespace}/${name}`
    const found = this.#leases.get(key)?.metadata
    if (found === undefined) return failure(404)
    const { uid = found.uid, resourceVersion = found.resourceVersion } = body.preconditions ?? {}
    if (uid !== found.uid || resourceVersion !== found.resourceVersion) return failure(409)
    this.#leases.delete(key)
    return { status: 200, body: { kind: 'Status', status: 'Success' } }
  }

  #keep(namespace: string, { metadata, spec }: Lease, uid: string): object {
    this.#version++
    const kept = { metadata: { ...metadata, uid, resourceVersion: String(this.#version) }, spec }
    this.#leases.set(`${namespace}/${metadata.name}`, { kind: 'Lease', ...kept } as Lease)
    return { kind: 'Lease', ...kept }
  }
}

function failure(code: number, reason: string | undefined = REASONS[code]): Answer {
  const message = `a test's server says ${reason}`
  return { status: code, body: { kind: 'Status', status: 'Failure', ...(reason && { reason }), message, code } }
}

/** The status of an answer to a Lease that is none. */
function problemOf({ metadata, spec }: Lease): number | undefined {
  const { renewTime, leaseDurationSeconds } = spec
  if (renewTime !== undefined && !MICRO_TIME.test(renewTime)) return 400
  const annotations = Object.entries(metadata.annotations ?? {}).reduce((sum, pair) => sum + pair.join('').length, 0)
  const isName = /^[a-z0-9]([-a-z0-9]*[a-z0-9])?$/.test(metadata.name)
  return isName && leaseDurationSeconds !== 0 && annotations <= MOST_ANNOTATIONS ? undefined : 422
}
