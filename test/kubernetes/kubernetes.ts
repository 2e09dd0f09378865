// The suite, the recorded answers and the manifests against a real kube-apiserver, as ci.sh starts it.
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import t from 'tap'
import { parseAllDocuments } from 'yaml'
import { openCoordinator } from '../../src/cluster/coordinator/open.js'
import { runSuite } from '../cluster/coordinator/cases.js'
import { kubernetesCluster } from '../cluster/coordinator/kubernetes-cluster.js'
import { NO_CREDENTIALS } from '../cluster/coordinator/leased-cluster.js'
import { ADMIN, ApiServer } from './apiserver.js'
import { type Call, differenceOf, exchange } from './contract.js'
import { writeKubeconfig } from './kubeconfig.js'
import { schemasOf } from './schemas.js'

/** An API server that has just started answers some requests after a second. */
const LEASE_SECONDS = 6
/** What the API answers, for the server that CI has instead: `RECORD=1` writes it anew. */
const RECORD = 'test/kubernetes/contract.json'
const SCHEMAS = 'test/kubernetes/schemas'
/** The service account of the manifests, as its token would name it. */
const ACCOUNT = {
  token: 'account-token',
  name: 'system:serviceaccount:muond:muond',
  groups: 'system:serviceaccounts,system:serviceaccounts:muond',
}
const STRANGER = { token: 'stranger-token', name: 'stranger', groups: 'trainers' }

const binary = process.env.KUBE_APISERVER
const manifests = process.env.MANIFESTS
if (!binary || !manifests) throw new Error('ci.sh gives KUBE_APISERVER, an executable, and MANIFESTS, a folder')
const server = await ApiServer.start(binary, [STRANGER, ACCOUNT])
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

t.test('it takes each manifest, to the last field', async (t) => {
  await server.call('POST', '/api/v1/namespaces', { metadata: { name: 'muond' } })
  for (const name of readdirSync(manifests)) {
    for (const document of parseAllDocuments(readFileSync(join(manifests, name), 'utf8'))) {
      const { path, body } = placeOf(document.toJS())
      const { status, body: answer } = await server.call('POST', `${path}?dryRun=All&fieldValidation=Strict`, body)
      t.match({ status, answer }, { status: 201 }, `${name}: ${path}`)
    }
  }
  const wrong = { apiVersion: 'v1', kind: 'Service', metadata: { name: 'wrong' }, spec: { clusterIp: 'None' } }
  const { status } = await server.call('POST', `${placeOf(wrong).path}?dryRun=All&fieldValidation=Strict`, wrong)
  t.equal(status, 400, 'a field that is not known')
})

t.test('with its Role a process has the Leases of its namespace, and nothing else', async (t) => {
  const documents = parseAllDocuments(readFileSync(join(manifests, 'leases.yaml'), 'utf8'))
  for (const document of documents) {
    const { path, body } = placeOf(document.toJS())
    if (/^Role/.test(body.kind)) t.match(await server.call('POST', path, body), { status: 201 })
  }
  const KUBECONFIG = await writeKubeconfig(join(folder, 'account'), { ...server, token: ACCOUNT.token })
  const open = async (namespace: string) => {
    Object.assign(process.env, { KUBECONFIG })
    const options = { url: 'http://a:1', lease_seconds: 60, report: () => ({ free_bytes: 1, device: 'cpu' }) }
    return openCoordinator({ kind: 'kubernetes', namespace }, NO_CREDENTIALS, options)
  }
  const own = await open('muond')
  await own.start()
  const assignment = { run: 'gpt', generation: 1, shards: [] }
  t.equal(await own.writeAssignment('gpt', assignment, undefined), true)
  const { version } = (await own.readAssignment('gpt'))!
  t.equal(await own.writeAssignment('gpt', { ...assignment, generation: 2 }, version), true)
  t.equal(await own.removeAssignment('gpt', (await own.readAssignment('gpt'))!.version), true)
  await own.stop()
  await t.rejects((await open('default')).start(), { message: /answers 403: .* cannot list resource "leases"/ })
  const secrets = await server.call('GET', '/api/v1/namespaces/muond/secrets', undefined, ACCOUNT.token)
  t.equal(secrets.status, 403)
})

t.test('its schemas are those that CI has', async (t) => {
  const { body } = await server.call('GET', '/openapi/v2')
  for (const [name, text] of schemasOf(Reflect.get(Object(body), 'definitions'))) {
    if (process.env.RECORD) writeFileSync(join(SCHEMAS, name), text)
    t.equal(readFileSync(join(SCHEMAS, name), 'utf8'), text, name)
  }
})

runSuite({ name: 'kubernetes', cluster, coordinator: server }, 'leased')

type Manifest = { readonly apiVersion: string; readonly kind: string }

/** Where a manifest is posted; a plural of these kinds is a singular with an s, or with ies for its y. */
function placeOf(body: Manifest): { path: string; body: Manifest } {
  const group = body.apiVersion === 'v1' ? '/api/v1' : `/apis/${body.apiVersion}`
  const kind = `${body.kind.toLowerCase()}s`.replace(/ys$/, 'ies')
  return { path: `${group}/namespaces/muond/${kind}`, body }
}

async function leasesOf(server: ApiServer, namespace: string): Promise<string> {
  await server.call('POST', '/api/v1/namespaces', { metadata: { name: namespace } })
  return `/apis/coordination.k8s.io/v1/namespaces/${namespace}/leases`
}
