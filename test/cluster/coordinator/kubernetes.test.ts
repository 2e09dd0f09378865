import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { KubeConfig } from '@kubernetes/client-node'
import t from 'tap'
import { requestJson } from '../../../src/cluster/coordinator/json-request.js'
import { KubernetesClient } from '../../../src/cluster/coordinator/kubernetes/client.js'
import { KubernetesRegistry } from '../../../src/cluster/coordinator/kubernetes/registry.js'
import { type Call, differenceOf, exchange } from '../../kubernetes/contract.js'
import { ADMIN, LeaseServer, STRANGER } from '../../kubernetes/lease-server.js'
import { runSuite } from './cases.js'
import { kubernetesCluster } from './kubernetes-cluster.js'

const server = await LeaseServer.start()
t.teardown(() => server.kill())
const folder = t.testdir()
let clusters = 0

t.test('the server of this test answers what a real one did', async (t) => {
  const tokens = { admin: ADMIN, wrong: 'of-nobody', stranger: STRANGER }
  const tls = { ca: readFileSync(server.ca, 'utf8') }
  const call: Call = ({ method, path, body, token }) => {
    const url = new URL(
      `https://127.0.0.1:${server.port}/apis/coordination.k8s.io/v1/namespaces/contract/leases${path}`,
    )
    const headers = { authorization: `Bearer ${tokens[token]}` }
    return requestJson({ url, method, body, tls, headers, timeout_ms: 10_000 })
  }
  const recorded = JSON.parse(readFileSync('test/kubernetes/contract.json', 'utf8'))
  t.equal(differenceOf(recorded, await exchange(call)), undefined)
  t.match(
    differenceOf([...recorded.slice(0, -1), { ...recorded.at(-1), status: 200 }], await exchange(call)),
    /^\{"name":"a list of none"/,
    'a namespace that is not empty is another one',
  )
})

runSuite(
  {
    name: 'kubernetes',
    coordinator: server,
    cluster: async () => kubernetesCluster({ ...server, token: ADMIN, namespace: `test-${clusters++}`, folder }),
  },
  'leased',
)

const LEASES = (namespace: string) => `/apis/coordination.k8s.io/v1/namespaces/${namespace}/leases`

function clientOf(namespace: string, token = ADMIN): KubernetesClient {
  const config = new KubeConfig()
  const cluster = { name: 'test', server: `https://127.0.0.1:${server.port}/`, caFile: server.ca, skipTLSVerify: false }
  config.loadFromClusterAndUser(cluster, { name: 'test', token })
  return new KubernetesClient(config, { namespace, timeout_ms: 10_000 })
}

const announcementOf = (url: string) => ({ url, incarnation: '1', free_bytes: 1, device: 'cpu' })

t.test('the Lease of a process that is long gone is removed', async (t) => {
  const { now } = performance
  t.teardown(() => {
    performance.now = now
  })
  const client = clientOf('gone')
  const [own, other] = ['http://own', 'http://other'].map(announcementOf)
  await new KubernetesRegistry(client, 12).renew(other!)
  const registry = new KubernetesRegistry(client, 12)
  t.match(await registry.renew(own!), [other, own])
  const ahead = (seconds: number) => {
    const at = now.call(performance) + seconds * 1000
    performance.now = () => at
  }
  ahead(11)
  t.match(await registry.renew(own!), [other, own])
  ahead(24)
  t.same(await registry.renew(own!), [own], 'its lease has ended')
  t.equal((await client.list('muond/kind=peer')).length, 2)
  ahead(12 * 21)
  await registry.renew(own!)
  t.equal((await client.list('muond/kind=peer')).length, 1)
})

t.test('what is no Lease of a process, or a refusal, says where', async (t) => {
  const client = clientOf('')
  t.equal(client.namespace, 'default', 'a context without a namespace')
  await client.create({ metadata: { name: 'odd', labels: { 'muond/kind': 'peer' } }, spec: {} })
  await t.rejects(new KubernetesRegistry(client, 12).renew(announcementOf('http://own')), {
    message: 'kubernetes:default: Lease odd is no announcement of a process: url is "", expected a url',
  })
  await t.rejects(clientOf('x', STRANGER).list('muond/kind=peer'), {
    message: `GET ${LEASES('x')} answers 403: a test's server says Forbidden`,
  })
  const registry = new KubernetesRegistry(client, 12)
  const name = `muond-head-${createHash('sha256').update('gpt').digest('hex').slice(0, 32)}`
  await client.create({ metadata: { name }, spec: {} })
  t.match(await registry.read({ kind: 'head', run: 'gpt' }), { value: '' }, 'a Lease of that name without a value')
  t.equal(await client.remove('none', { uid: '1', resourceVersion: '1' }), false)
})
