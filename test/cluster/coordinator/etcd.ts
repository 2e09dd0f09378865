// The suite against a real etcd, which ci.sh installs.
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import t, { type Test } from 'tap'
import { readCluster } from '../../../src/cluster/coordinator/cluster-setting.js'
import { EtcdClient } from '../../../src/cluster/coordinator/etcd/client.js'
import { EtcdRegistry } from '../../../src/cluster/coordinator/etcd/registry.js'
import { type EtcdCredentials, openCoordinator } from '../../../src/cluster/coordinator/open.js'
import { runSuite } from './cases.js'
import { LEASE_SECONDS } from './cluster.js'
import { EtcdServer } from './etcd-server.js'
import { leasedCluster, NO_CREDENTIALS } from './leased-cluster.js'
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
    lease_seconds: LEASE_SECONDS,
    mostBytes: 1_400_000,
    spoil: async (run, content) => {
      await direct.call('/v3/kv/put', { key: base64(`${prefix}/assignment/${run}`), value: base64(content) })
    },
  })
}

runSuite({ name: 'etcd', cluster, coordinator: server }, 'leased')

const golden = (name: string) => resolve('test/golden/tls', name)

const TLS_FLAGS = ['--cert-file', golden('server.pem'), '--key-file', golden('server.key')]
const CLIENT_FLAGS = ['--trusted-ca-file', golden('ca.pem'), '--client-cert-auth']
const CERTIFICATE = { ...NO_CREDENTIALS, ca: golden('ca.pem'), cert: golden('client.pem'), key: golden('client.key') }
const OPTIONS = { url: 'http://a:8787', lease_seconds: 60, report: () => ({ free_bytes: 1, device: 'cpu' }) }

async function startEtcd(t: Test, flags: readonly string[]): Promise<EtcdServer> {
  const server = await EtcdServer.start({ scheme: 'https', flags: [...TLS_FLAGS, ...flags] })
  t.teardown(() => server.close())
  return server
}

/** A user `muond` who may change what is below /muond/ alone. */
async function addUsers(server: EtcdServer): Promise<void> {
  const tls = { ca: readFileSync(golden('ca.pem'), 'utf8') }
  const root = new EtcdClient({ urls: [server.url], tls, user: undefined, timeout_ms: 5000 })
  for (const name of ['root', 'muond']) {
    await root.call('/v3/auth/user/add', { name, password: `${name}'s` })
    await root.call('/v3/auth/role/add', { name })
    await root.call('/v3/auth/user/grant', { user: name, role: name })
  }
  // '0' is the character behind '/'.
  const perm = { permType: 'READWRITE', key: base64('/muond/'), range_end: base64('/muond0') }
  await root.call('/v3/auth/role/grant', { name: 'muond', perm })
  await root.call('/v3/auth/enable', {})
}

t.test('an etcd that wants a certificate of its clients', async (t) => {
  const server = await startEtcd(t, CLIENT_FLAGS)
  const open = (own: Partial<EtcdCredentials> = {}) =>
    openCoordinator(readCluster(`etcds://127.0.0.1:${server.port}`), { ...CERTIFICATE, ...own }, OPTIONS)
  const a = await open()
  await a.start()
  t.match(a.peers(), [{ url: 'http://a:8787' }])
  await a.stop()
  for (const [own, problem] of [
    [{ ca: '' }, /self-signed|certificate/],
    [{ cert: '', key: '' }, /certificate|ECONNRESET|hang up/i],
  ] as const)
    await t.rejects((await open(own)).start(), { name: 'ConfigError', message: problem })
})

t.test('an etcd with users, of which one member is down, and that ends its tokens', async (t) => {
  const server = await startEtcd(t, [])
  await addUsers(server)
  const password_file = join(t.testdir({ password: "muond's\n" }), 'password')
  const credentials = { ...NO_CREDENTIALS, ca: golden('ca.pem'), user: 'muond', password_file }
  const setting = `etcds://127.0.0.1:1,127.0.0.1:${server.port}`
  const open = (own: Partial<EtcdCredentials> = {}, text = setting) =>
    openCoordinator(readCluster(text), { ...credentials, ...own }, OPTIONS)
  const a = await open()
  await a.start()
  t.teardown(() => a.stop())
  const assignment = { run: 'gpt', generation: 1, shards: [] }
  t.equal(await a.writeAssignment('gpt', assignment, undefined), true)
  await server.kill()
  await t.rejects(a.readAssignment('gpt'), { message: /ECONNREFUSED.*; .*ECONNREFUSED/ })
  await server.start()
  t.match(await a.readAssignment('gpt'), { value: assignment })
  // A password that is set, be it the same, ends the tokens of its user.
  const tls = { ca: readFileSync(golden('ca.pem'), 'utf8') }
  const root = { name: 'root', password: "root's" }
  const admin = new EtcdClient({ urls: [server.url], tls, user: root, timeout_ms: 5000 })
  await admin.call('/v3/auth/user/changepw', { name: 'muond', password: "muond's" })
  t.match(await a.readAssignment('gpt'), { value: assignment }, 'the password is shown again')
  for (const [own, problem] of [
    [{ user: '' }, /user name is empty|permission denied/],
    [{ password_file: golden('ca.pem') }, /authentication failed, invalid user ID or password/],
  ] as const)
    await t.rejects((await open(own)).start(), { name: 'ConfigError', message: problem })
  await t.rejects((await open({}, `${setting}/other`)).start(), { message: /permission denied/ }, 'keys of others')
})

t.test('a lease that etcd has ended is granted anew', async (t) => {
  const client = new EtcdClient({ urls: [server.url], tls: {}, user: undefined, timeout_ms: 5000 })
  const registry = new EtcdRegistry(client, { name: 'etcd', prefix: '/ended', lease_seconds: 60 })
  const own = { url: 'http://own:1', incarnation: '1', free_bytes: 1, device: 'cpu' }
  await registry.leave()
  t.same(await registry.renew(own), [own])
  const { leases } = await client.call('/v3/lease/leases', {})
  for (const { ID } of leases as { ID: string }[]) await client.call('/v3/lease/revoke', { ID })
  t.same(await registry.renew(own), [own])
  const found = await client.call('/v3/kv/range', { key: base64('/ended/peers/http://own:1') })
  t.match(found, { count: '1' })
  await t.rejects(client.call('/v3/lease/revoke', { ID: '1' }), { code: 5 })
})
