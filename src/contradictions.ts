import type { Config } from './config.js'

const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|::1)$/i

/** What settings that are right by themselves may not be together. */
export function contradictionsIn(config: Config): string[] {
  const { tls_cert, tls_key, tls_client_ca } = config
  return [
    ...((tls_cert === '') === (tls_key === '') ? [] : ['tls_cert and tls_key go together: only one of them is given']),
    ...(tls_client_ca === '' || tls_cert !== '' ? [] : ['tls_client_ca needs tls_cert and tls_key']),
    ...objectsProblems(config),
    ...opennessOf(config),
    ...clusterProblems(config),
  ]
}

/** What settings of several processes may not be. */
function clusterProblems(config: Config): string[] {
  const { peers, advertise, shards, cluster_key, cluster_key_file, tls_client_ca } = config
  const keys = [cluster_key, cluster_key_file].filter(Boolean).length
  if (peers.length === 0) {
    const alone = { advertise: advertise !== '', shards: shards > 1, cluster_key: keys > 0 }
    const given = Object.entries(alone).flatMap(([name, isGiven]) => (isGiven ? [name] : []))
    return given.map((name) => `${name} needs peers, the URLs of all processes`)
  }
  const wrong = peers.filter((url) => !isOrigin(url))
  return [
    ...wrong.map((url) => `peers has '${url}', expected the URL of a process without a path: http://10.0.0.2:8787`),
    ...(peers.includes(advertise)
      ? []
      : [`advertise is '${advertise}', expected the one of peers that is this process`]),
    ...(new Set(peers).size === peers.length ? [] : ['peers has a URL twice']),
    ...(keys === 1
      ? []
      : ['peers needs the key of the cluster, once: MUOND_CLUSTER_KEY, or --cluster-key-file with a file that has it']),
    ...(tls_client_ca === '' ? [] : ['peers and tls_client_ca: processes have no certificates to show each other']),
  ]
}

/** Whether a text is an origin in its one spelling, by which processes are known. */
function isOrigin(text: string): boolean {
  return URL.canParse(text) && new URL(text).origin === text && /^https?:/.test(text)
}

/** Where the setting `data` is in S3. */
export const S3_SCHEME = 's3://'

/** What a store of objects cannot do, and what is only for one. */
function objectsProblems({ data, keep_journal, s3_endpoint, s3_region, s3_path_style }: Config): string[] {
  if (data.startsWith(S3_SCHEME)) return keep_journal ? [`keep_journal needs a folder as --data, got '${data}'`] : []
  const given = s3_endpoint !== '' || s3_region !== '' || s3_path_style
  return given ? [`s3_endpoint, s3_region and s3_path_style are for --data s3://BUCKET/PREFIX, got '${data}'`] : []
}

/** Whether only processes of this machine reach a service that listens on a host. */
export function isLoopback(host: string): boolean {
  return LOOPBACK.test(host)
}

/**
 * What reaches beyond the loopback has keys and TLS, unless it is said aloud that it has not (docs/security.md).
 * A client certificate shows as well as a key who comes.
 */
function opennessOf(config: Config): string[] {
  const { host, insecure_no_keys, insecure_no_tls, keys_file, api_keys, tls_cert, tls_client_ca } = config
  if (isLoopback(host)) return []
  const isGuarded = keys_file !== '' || api_keys.length > 0 || tls_client_ca !== ''
  const noKeys =
    'there are no keys: whoever reaches it could do everything. Give --keys-file (muond keys add), or --insecure-no-keys'
  const noTls =
    'there is no TLS: whoever is on the way could read keys and gradients. Give --tls-cert and --tls-key, or --insecure-no-tls, behind a proxy that has TLS'
  return [
    ...(isGuarded || insecure_no_keys ? [] : [`host is '${host}' and ${noKeys}`]),
    ...(tls_cert !== '' || insecure_no_tls ? [] : [`host is '${host}' and ${noTls}`]),
  ]
}
