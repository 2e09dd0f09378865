import { ConfigError } from '../../config.js'

/** What `--cluster` names: the members of an etcd and the prefix of the keys there, or a namespace of Kubernetes. */
export type ClusterSetting =
  | { readonly kind: 'etcd'; readonly urls: readonly string[]; readonly prefix: string; readonly name: string }
  | { readonly kind: 'kubernetes'; readonly namespace: string }

const ETCD = /^(etcds?):\/\/([^/]+)(\/.*)?$/
const KUBERNETES = /^kubernetes(?::([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?))?$/
const HOST = /^([A-Za-z0-9.-]+|\[[0-9a-f:.]+\]):(\d{1,5})$/
const EXPECTED = 'etcd://host:2379[,host:2379…]/prefix, etcds://… for TLS, or kubernetes[:namespace]'

/**
 * Reads the setting. An etcd without a prefix has that of `muond`; an empty namespace is that of the configuration of
 * Kubernetes. Throws ConfigError for anything else.
 */
export function readCluster(text: string): ClusterSetting {
  const [isKubernetes, namespace = ''] = KUBERNETES.exec(text) ?? []
  if (isKubernetes !== undefined) return { kind: 'kubernetes', namespace }
  const [, scheme, members = '', path = ''] = ETCD.exec(text) ?? []
  const hosts = members.split(',')
  const prefix = path.replace(/\/+$/, '') || '/muond'
  if (scheme === undefined || !hosts.every(isHost)) throw new ConfigError(`cluster is '${text}', expected ${EXPECTED}`)
  const protocol = scheme === 'etcds' ? 'https' : 'http'
  return { kind: 'etcd', urls: hosts.map((host) => `${protocol}://${host}`), prefix, name: text }
}

function isHost(text: string): boolean {
  const [, , port] = HOST.exec(text) ?? []
  return port !== undefined && Number(port) > 0 && Number(port) < 65_536
}
