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

/** An answer takes milliseconds; one that takes so long is none, and a lease of 12 seconds outlives three of them. */
const TIMEOUT_MS = 3000

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

/** `timeout_ms`: what an answer may take. */
export type CoordinatorOptions = LeasedOptions & { readonly timeout_ms?: number }

/** The coordinator of a setting. Throws ConfigError where a file or a configuration cannot be read. Asks nobody yet. */
export async function openCoordinator(
  setting: ClusterSetting,
  etcd: EtcdCredentials,
  options: CoordinatorOptions,
): Promise<LeasedCoordinator> {
  return new LeasedCoordinator(await registryOf(setting, etcd, options), options)
}

async function registryOf(
  setting: ClusterSetting,
  etcd: EtcdCredentials,
  { lease_seconds, timeout_ms = TIMEOUT_MS }: CoordinatorOptions,
): Promise<Registry> {
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
