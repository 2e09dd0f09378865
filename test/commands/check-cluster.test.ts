import { chmodSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import t from 'tap'
import { readClusterKey } from '../../src/access/cluster-key.js'
import { checkCluster } from '../../src/commands/operate/check/cluster.js'
import { configOf, readCommand } from '../../src/config.js'

const KEY = 'the-key-of-the-cluster'
const SELF = 'http://127.0.0.1:8787'
const OTHER = 'http://127.0.0.1:8788'
const CLUSTER = { peers: `${SELF},${OTHER}`, advertise: SELF, cluster_key: KEY }

t.test('settings of several processes that contradict each other are refused, each in one line', async (t) => {
  const wrong: [Parameters<typeof configOf>[0], RegExp][] = [
    [{ advertise: SELF }, /^advertise needs peers/],
    [{ shards: 2 }, /^shards needs peers/],
    [{ cluster_key: KEY }, /^cluster_key needs peers/],
    [{ ...CLUSTER, advertise: '' }, /advertise is '', expected the one of peers/],
    [{ ...CLUSTER, peers: `${SELF},10.0.0.2:8787` }, /peers has '10.0.0.2:8787', expected the URL of a process/],
    [{ ...CLUSTER, peers: `${SELF},${OTHER}/` }, /peers has 'http:\/\/127.0.0.1:8788\/'/],
    [{ ...CLUSTER, peers: `${SELF},ftp://10.0.0.2` }, /peers has 'ftp:/],
    [{ ...CLUSTER, peers: `${SELF},${SELF}` }, /peers has a URL twice/],
    [{ ...CLUSTER, cluster_key: '' }, /needs the key of the cluster, once/],
    [{ ...CLUSTER, cluster_key_file: 'key' }, /needs the key of the cluster, once/],
    [{ ...CLUSTER, cluster_key: 'short' }, /cluster_key: must be one key .* got another value/],
    [{ ...CLUSTER, tls_cert: 'a', tls_key: 'b', tls_client_ca: 'c' }, /peers and tls_client_ca/],
  ]
  for (const [settings, message] of wrong)
    t.throws(() => configOf(settings), { name: 'ConfigError', message }, `${message}`)
  t.match(configOf(CLUSTER), { peers: [SELF, OTHER], shards: 1 })
  t.throws(() => readCommand(['--cluster-key', KEY], {}), { message: /use MUOND_CLUSTER_KEY or --cluster-key-file/ })
})

t.test('the key of the cluster may be in a file', async (t) => {
  const path = join(t.testdir({ key: `${KEY}\n`, short: 'short', two: `${KEY} ${KEY}` }), 'key')
  t.equal(readClusterKey({ cluster_key_file: path }), KEY)
  t.equal(readClusterKey({ cluster_key: KEY }), KEY)
  t.equal(readClusterKey({}), '')
  for (const other of ['short', 'two'])
    t.throws(() => readClusterKey({ cluster_key_file: join(path, '..', other) }), {
      message: /has no key: one line of 16/,
    })
  t.throws(() => readClusterKey({ cluster_key_file: `${path}-not` }), { message: /cannot be read: .*ENOENT/ })
})

t.test('muond check looks at the key and the other processes', async (t) => {
  const answers = createServer((request, reply) => reply.writeHead(request.url === '/livez' ? 200 : 404).end())
  const refuses = createServer((_, reply) => reply.writeHead(502).end())
  for (const server of [answers, refuses]) {
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    t.teardown(() => server.close())
  }
  const urlOf = (server: typeof answers) => `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  const file = join(t.testdir({ key: KEY }), 'key')
  chmodSync(file, 0o600)
  const peers = [SELF, urlOf(answers), urlOf(refuses), 'http://127.0.0.1:1'].join(',')
  const config = configOf({ peers, advertise: SELF, cluster_key_file: file })
  t.match(await checkCluster(config), [
    { check: 'cluster key', state: 'ok', found: file },
    { check: 'peer', state: 'ok', found: urlOf(answers) },
    { check: 'peer', state: 'warning', found: /HTTP status 502/ },
    { check: 'peer', state: 'warning', found: /does not answer/ },
  ])
  chmodSync(file, 0o644)
  t.match(await checkCluster(configOf({ peers: SELF, advertise: SELF, cluster_key_file: file })), [
    { state: 'warning', found: /mode 644/ },
  ])
  t.match(await checkCluster(configOf({ peers: SELF, advertise: SELF, cluster_key: KEY })), [{ state: 'ok' }])
  writeFileSync(file, 'short')
  t.match(await checkCluster(configOf({ peers: SELF, advertise: SELF, cluster_key_file: file })), [{ state: 'error' }])
  t.same(await checkCluster(configOf()), [])
})
