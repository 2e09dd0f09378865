// The suite against a real kube-apiserver, whose path is the only argument.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { runSuite } from '../cluster/coordinator/cases.js'
import { kubernetesCluster } from '../cluster/coordinator/kubernetes-cluster.js'
import { ADMIN, ApiServer } from './apiserver.js'
import { type Call, differenceOf, exchange } from './contract.js'

/** An API server that has just started answers some requests after a second. */
const LEASE_SECONDS = 6
/** What the API answers, for the server that CI has instead: `RECORD=1` writes it anew. */
const RECORD = 'test/kubernetes/contract.json'
const STRANGER = { token: 'stranger-token', name: 'stranger', groups: 'trainers' }

const binary = process.env.KUBE_APISERVER
if (!binary) throw new Error('KUBE_APISERVER is the path of a kube-apiserver: see build-apiserver.sh')
const server = await ApiServer.start(binary, [STRANGER])
const folder = mkdtempSync(join(tmpdir(), 'muond-kubernetes-'))
t.teardown(async () => {
  await server.close()
  rmSync(folder, { recursive: true })
})
let clusters = 0

async function cluster() {
  const namespace = `test-${clusters++}`
  await leasesOf(server, namespace)
  return kubernetesCluster({ ...server, token: ADMIN, namespace, folder, lease_seconds: LEASE_SECONDS })
}

t.test('it answers as it was recorded', async (t) => {
  const path = await leasesOf(server, 'contract')
  const tokens = { admin: ADMIN, wrong: 'of-nobody', stranger: STRANGER.token }
  const call: Call = ({ method, path: rest, body, token }) => server.call(method, path + rest, body, tokens[token])
  const exchanges = await exchange(call)
  if (process.env.RECORD) writeFileSync(RECORD, `${JSON.stringify(exchanges, undefined, 2)}\n`)
  t.equal(differenceOf(JSON.parse(readFileSync(RECORD, 'utf8')), exchanges), undefined)
})

runSuite({ name: 'kubernetes', cluster, coordinator: server }, 'leased')

async function leasesOf(server: ApiServer, namespace: string): Promise<string> {
  await server.call('POST', '/api/v1/namespaces', { metadata: { name: namespace } })
  return `/apis/coordination.k8s.io/v1/namespaces/${namespace}/leases`
}
