import { readFileSync } from 'node:fs'
import { ConfigError } from '../../config.js'
import { errorText } from '../../errors.js'
import type { ClusterSetting } from './cluster-setting.js'
import { EtcdClient, type EtcdOptions } from './etcd/client.js'
import { EtcdRegistry } from './etcd/registry.js'
import { KubernetesClient, loadKubeConfig } from './kubernetes/client.js'
import { KubernetesRegistry } from './kubernetes/registry.js'
import { LeasedCoordinator, type LeasedOptions } from './leased.js'
import type { Registry } from './registry.js'

/** A lease lasts so many requests that get no answer: a member of etcd may hang, and it is still renewed. */
const TIMEOUTS_PER_LEASE = 4

/** Files, and the name of a user, by which etcd is reached; an empty one is none. */
export type EtcdCredentials = {
  /** Authorities, PEM, of the certificates of etcd; without them the authorities that Node knows. */
  readonly ca: string
  /** Certificate of this process, PEM, for an etcd with `--client-cert-auth`, and its private key. */
  readonly cert: string
  readonly key: string
  readonly user: string
  readonly password_file: string
}

/** The coordinator of a setting. Throws ConfigError where a file or a configuration cannot be read. Asks nobody yet. */
export async function openCoordinator(
  setting: ClusterSetting,
  etcd: EtcdCredentials,
  options: LeasedOptions,
): Promise<LeasedCoordinator> {
  return new LeasedCoordinator(await registryOf(setting, etcd, options.lease_seconds), options)
}

async function registryOf(setting: ClusterSetting, etcd: EtcdCredentials, lease_seconds: number): Promise<Registry> {
  const timeout_ms = (lease_seconds * 1000) / TIMEOUTS_PER_LEASE
  if (setting.kind === 'etcd') {
    const client = new EtcdClient({ urls: setting.urls, ...credentialsOf(etcd), timeout_ms })
    return new EtcdRegistry(client, { ...setting, lease_seconds })
  }
  const client = new KubernetesClient(await loadKubeConfig(), { namespace: setting.namespace, timeout_ms })
  return new KubernetesRegistry(client, lease_seconds)
}

function credentialsOf({ ca, cert, key, user, password_file }: EtcdCredentials): Pick<EtcdOptions, 'tls' | 'user'> {
  const tls = {
    ...(ca && { ca: readSetting('etcd_ca', ca) }),
    ...(cert && { cert: readSetting('etcd_cert', cert) }),
    ...(key && { key: readSetting('etcd_key', key) }),
  }
  if (user === '') return { tls, user: undefined }
  // An editor ends a file with a line break, and no password has one.
  return { tls, user: { name: user, password: readSetting('etcd_password_file', password_file).trimEnd() } }
}

function readSetting(name: string, path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch (error) {
    throw new ConfigError(`${name} '${path}' cannot be read: ${errorText(error)}`)
  }
}
