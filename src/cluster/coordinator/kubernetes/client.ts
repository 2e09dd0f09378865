import type { RequestOptions } from 'node:https'
import type { KubeConfig } from '@kubernetes/client-node'
import { ConfigError } from '../../../config.js'
import { requestJson } from '../json-request.js'

/** What is used of a Lease of coordination.k8s.io/v1. */
export type Lease = {
  readonly metadata: {
    readonly name: string
    /** Both of one that is there. */
    readonly uid?: string
    readonly resourceVersion?: string
    readonly labels?: Readonly<Record<string, string>>
    readonly annotations?: Readonly<Record<string, string>>
  }
  readonly spec: {
    readonly holderIdentity?: string
    readonly leaseDurationSeconds?: number
    /** With microseconds, or the API refuses it. */
    readonly renewTime?: string
  }
}

/** Which Lease of a name, and which of its contents. */
export type LeaseVersion = { readonly uid: string; readonly resourceVersion: string }

const NOT_FOUND = 404
/** POST of a name that is there, PUT or DELETE of another version than is there. */
const CONFLICT = 409

/**
 * The Leases of one namespace. Configuration and credentials are those of the official client, which this file alone
 * knows: in a pod its service account, whose token it reads again as it is renewed, elsewhere $KUBECONFIG or
 * ~/.kube/config. The calls are plain HTTP, because that client bounds no request in time.
 */
export class KubernetesClient {
  readonly namespace: string
  readonly #config: KubeConfig
  readonly #server: string
  readonly #timeout_ms: number

  constructor(config: KubeConfig, { namespace, timeout_ms }: { namespace: string; timeout_ms: number }) {
    this.namespace = namespace || namespaceOf(config)
    this.#config = config
    this.#server = serverOf(config)
    this.#timeout_ms = timeout_ms
  }

  async list(labels: string): Promise<readonly Lease[]> {
    const { body } = await this.#call('GET', { query: `?labelSelector=${encodeURIComponent(labels)}` })
    return (body as { items: readonly Lease[] }).items
  }

  async get(name: string): Promise<Lease | undefined> {
    const { status, body } = await this.#call('GET', { name, accepted: [NOT_FOUND] })
    return status === NOT_FOUND ? undefined : (body as Lease)
  }

  /** Answers the Lease as it is then; undefined where one of its name is there. */
  async create(lease: Lease): Promise<Lease | undefined> {
    const { status, body } = await this.#call('POST', { lease, accepted: [CONFLICT] })
    return status === CONFLICT ? undefined : (body as Lease)
  }

  /**
   * Answers the Lease as it is then; undefined where that of `version` is no more. The uid must be in it: without, the
   * API makes a Lease of one that was removed, whatever its `resourceVersion`.
   */
  async replace(lease: Lease, version: LeaseVersion): Promise<Lease | undefined> {
    const { name } = lease.metadata
    const body = { ...lease, metadata: { ...lease.metadata, ...version } }
    const { status, body: replaced } = await this.#call('PUT', { name, lease: body, accepted: [NOT_FOUND, CONFLICT] })
    return status === NOT_FOUND || status === CONFLICT ? undefined : (replaced as Lease)
  }

  /** Answers whether it was there, in the given version. */
  async remove(name: string, version: LeaseVersion): Promise<boolean> {
    const content = { preconditions: version }
    const { status } = await this.#call('DELETE', { name, content, accepted: [NOT_FOUND, CONFLICT] })
    return status !== NOT_FOUND && status !== CONFLICT
  }

  async #call(
    method: 'GET' | 'POST' | 'PUT' | 'DELETE',
    asked: { name?: string; query?: string; lease?: Lease; content?: object; accepted?: readonly number[] },
  ): Promise<{ status: number; body: unknown }> {
    const { name, query = '', lease, content, accepted = [] } = asked
    const path = `/apis/coordination.k8s.io/v1/namespaces/${this.namespace}/leases${name === undefined ? '' : `/${name}`}`
    const url = new URL(this.#server + path + query)
    const body = lease ? { apiVersion: 'coordination.k8s.io/v1', kind: 'Lease', ...lease } : content
    const tls: RequestOptions = {}
    await this.#config.applyToHTTPSOptions(tls)
    const answer = await requestJson({ url, method, body, tls, timeout_ms: this.#timeout_ms })
    if (answer.status < 300 || accepted.includes(answer.status)) return answer
    throw new Error(`${method} ${path} answers ${answer.status}: ${Object(answer.body).message}`)
  }
}

/** The official client, which is loaded only where it is used. Throws ConfigError where it finds no configuration. */
export async function loadKubeConfig(): Promise<KubeConfig> {
  const { KubeConfig } = await import('@kubernetes/client-node')
  const config = new KubeConfig()
  config.loadFromDefault()
  return config
}

function serverOf(config: KubeConfig): string {
  const cluster = config.getCurrentCluster()
  if (cluster) return cluster.server.replace(/\/$/, '')
  throw new ConfigError(
    `the configuration of Kubernetes has no cluster for its context '${config.getCurrentContext()}'`,
  )
}

function namespaceOf(config: KubeConfig): string {
  return config.getContextObject(config.getCurrentContext())?.namespace ?? 'default'
}
