import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { requestJson } from '../../../src/cluster/coordinator/json-request.js'
import { writeKubeconfig } from '../../kubernetes/kubeconfig.js'
import { LEASE_SECONDS, type TestCluster } from './cluster.js'
import { leasedCluster } from './leased-cluster.js'
import { CuttableProxy } from './proxy.js'

const golden = (name: string) => readFileSync(join('test/golden/tls', name), 'utf8')
const PROXY_TLS = { key: golden('server.key'), cert: golden('server.pem'), ca: golden('ca.pem') }

/** A namespace of an API server. `folder` takes the configurations of its clients. */
export async function kubernetesCluster(of: {
  port: number
  ca: string
  token: string
  namespace: string
  folder: string
  lease_seconds?: number
}): Promise<TestCluster> {
  const { port, ca, token, namespace, folder, lease_seconds = LEASE_SECONDS } = of
  const proxy = await CuttableProxy.start(port, PROXY_TLS)
  const configOf = (name: string, port: number) =>
    writeKubeconfig(join(folder, `${namespace}-${name}.json`), { port, ca, token })
  const setting = `kubernetes:${namespace}`
  return leasedCluster({
    setting: { proxied: setting, direct: setting },
    env: {
      proxied: { KUBECONFIG: await configOf('proxied', proxy.port) },
      direct: { KUBECONFIG: await configOf('direct', port) },
    },
    proxy,
    lease_seconds,
    mostBytes: 250_000,
    spoil: async (run, content) => {
      const path = `/apis/coordination.k8s.io/v1/namespaces/${namespace}/leases`
      const call = async (method: 'POST' | 'DELETE', name: string, body?: unknown) => {
        const [tls, headers] = [{ ca: await readFile(ca, 'utf8') }, { authorization: `Bearer ${token}` }]
        const url = new URL(`https://127.0.0.1:${port}${path}${name}`)
        return requestJson({ url, method, body, tls, headers, timeout_ms: 5000 })
      }
      const name = `muond-assignment-${createHash('sha256').update(run).digest('hex').slice(0, 32)}`
      await call('DELETE', `/${name}`)
      await call('POST', '', {
        ...{ apiVersion: 'coordination.k8s.io/v1', kind: 'Lease' },
        metadata: { name, annotations: { 'muond/value': content } },
        spec: {},
      })
    },
  })
}
