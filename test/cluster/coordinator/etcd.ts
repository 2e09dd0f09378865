// The suite against a real etcd, which ci.sh installs.
import t from 'tap'
import { EtcdClient } from '../../../src/cluster/coordinator/etcd/client.js'
import { runSuite } from './cases.js'
import { EtcdServer } from './etcd-server.js'
import { leasedCluster } from './leased-cluster.js'
import { CuttableProxy } from './proxy.js'

const server = await EtcdServer.start()
t.teardown(() => server.close())
const direct = new EtcdClient({ urls: [server.url], tls: {}, user: undefined, timeout_ms: 5000 })
const base64 = (text: string) => Buffer.from(text).toString('base64')
let clusters = 0

async function cluster() {
  const proxy = await CuttableProxy.start(server.port)
  const prefix = `/test/${clusters++}`
  return leasedCluster({
    setting: { proxied: `etcd://127.0.0.1:${proxy.port}${prefix}`, direct: `etcd://127.0.0.1:${server.port}${prefix}` },
    env: { proxied: {}, direct: {} },
    proxy,
    mostBytes: 1_400_000,
    spoil: async (run, content) => {
      await direct.call('/v3/kv/put', { key: base64(`${prefix}/assignment/${run}`), value: base64(content) })
    },
  })
}

runSuite({ name: 'etcd', cluster, coordinator: server }, 'leased')
