import { readCluster } from '../../../src/cluster/coordinator/cluster-setting.js'
import { type EtcdCredentials, openCoordinator } from '../../../src/cluster/coordinator/open.js'
import { Child, type TestCluster } from './cluster.js'
import type { CuttableProxy } from './proxy.js'

/** A machine that runs many tests at once answers late. */
const TIMEOUT_MS = 30_000

export const NO_CREDENTIALS: EtcdCredentials = { ca: '', cert: '', key: '', user: '', password_file: '' }

export type LeasedMeans = {
  /** The setting `cluster` through a proxy, and without it. */
  readonly setting: { readonly proxied: string; readonly direct: string }
  readonly proxy: CuttableProxy
  /** The variables of forked processes, and of this one while a coordinator is opened. */
  readonly env: { readonly proxied: NodeJS.ProcessEnv; readonly direct: NodeJS.ProcessEnv }
  readonly mostBytes: number
  readonly lease_seconds: number
  spoil(run: string, content: string): Promise<void>
}

/** Coordinators that read their configuration from the variables of the process are opened one after the other. */
let opening: Promise<unknown> = Promise.resolve()

/** The cluster of a case, whose processes are named by urls at which nobody listens: leases ask none. */
export function leasedCluster(means: LeasedMeans): TestCluster {
  const { setting, proxy, env, mostBytes, spoil, lease_seconds } = means
  const urlOf = (host: string) => `http://${host}.example:8787`
  return {
    kind: 'leased',
    urlOf,
    mostBytes,
    spoil,
    open: (host, report = () => ({ free_bytes: 1, device: 'cpu' })) => {
      const opened = opening.then(() => {
        Object.assign(process.env, env.proxied)
        const options = { url: urlOf(host), lease_seconds, report, timeout_ms: TIMEOUT_MS }
        return openCoordinator(readCluster(setting.proxied), NO_CREDENTIALS, options)
      })
      opening = opened.catch(() => undefined)
      return opened
    },
    fork: (host) => Child.start(urlOf(host), ['leased', setting.direct, urlOf(host), `${lease_seconds}`], env.direct),
    partition: () => proxy.cut(),
    heal: () => proxy.heal(),
    lose: { requests: (count) => proxy.loseRequests(count), answers: (count) => proxy.loseAnswers(count) },
    close: () => proxy.close(),
  }
}
