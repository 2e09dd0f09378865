import t from 'tap'
import { readAnnouncement } from '../../../src/cluster/coordinator/announcement.js'
import { readCluster } from '../../../src/cluster/coordinator/cluster-setting.js'
import { NewestEntries } from '../../../src/cluster/coordinator/newest-entries.js'
import { openCoordinator } from '../../../src/cluster/coordinator/open.js'
import { peerUrls } from '../../../src/cluster/coordinator/peer-url.js'
import { highestRendezvous } from '../../../src/cluster/coordinator/rendezvous.js'
import { NO_CREDENTIALS } from './leased-cluster.js'

const OPTIONS = { url: 'http://a:1', lease_seconds: 12, report: () => ({ free_bytes: 1, device: 'cpu' }) }

t.test('the setting `cluster` names an etcd or a namespace', async (t) => {
  const etcd = (text: string, urls: string[], prefix: string) =>
    t.same(readCluster(text), { kind: 'etcd', urls, prefix, name: text })
  etcd('etcd://10.0.0.1:2379', ['http://10.0.0.1:2379'], '/muond')
  etcd('etcd://a:2379,b.example:2380/', ['http://a:2379', 'http://b.example:2380'], '/muond')
  etcd('etcds://[::1]:2379/team/muond/', ['https://[::1]:2379'], '/team/muond')
  t.same(readCluster('kubernetes'), { kind: 'kubernetes', namespace: '' })
  t.same(readCluster('kubernetes:training'), { kind: 'kubernetes', namespace: 'training' })
  for (const text of [
    ...[
      '',
      'etcd:',
      'etcd://',
      'etcd://a',
      'etcd://a:0',
      'etcd://a:70000',
      'etcd://a:1,',
      'etcd://a:1,b',
      'http://a:1',
    ],
    ...['etcd://user:secret@a:1', 'kubernetes:', 'kubernetes:A', 'kubernetes:a/b', 'Kubernetes'],
  ])
    t.throws(() => readCluster(text), {
      name: 'ConfigError',
      message: `cluster is '${text}', expected etcd://host:2379[,host:2379…]/prefix, etcds://… for TLS, or kubernetes[:namespace]`,
    })
})

t.test('a peer is an origin, spelt in one way', async (t) => {
  const texts = ['http://B:80', 'https://a:8787/', 'http://b']
  t.same(peerUrls(texts, 'peers'), ['http://b', 'https://a:8787'])
  for (const text of [
    'none',
    'a:1',
    'ws://a:1',
    'http://a:1/v1',
    'http://a:1?x',
    'http://a:1#x',
    'http://u@a:1',
    'http://:p@a:1',
  ])
    t.throws(() => peerUrls([text], 'peers'), {
      name: 'ConfigError',
      message: `peers has '${text}', expected the URL of a process without a path: http://10.0.0.2:8787`,
    })
})

t.test('a process that goes takes only its own names with it', async (t) => {
  const urls = ['http://a', 'http://b', 'http://c', 'http://d']
  const names = Array.from({ length: 400 }, (_, i) => `run.${i}`)
  const before = names.map((name) => highestRendezvous(name, urls))
  for (const url of urls) t.ok(before.filter((each) => each === url).length > 60, 'all have about the same')
  const after = names.map((name) => highestRendezvous(name, urls.slice(0, 3)))
  for (const [i, url] of before.entries()) if (url !== 'http://d') t.equal(after[i], url)
})

t.test('an announcement has what is known of a process, and may have more', async (t) => {
  const own = { url: 'http://a:1', incarnation: '1', free_bytes: 2, device: 'cpu' }
  t.same(readAnnouncement(JSON.stringify({ ...own, zone: 'z' }), 'key'), own)
  for (const [text, problem] of [
    ['{', /^key is no announcement of a process: .*JSON/],
    ['{}', /^key is no announcement of a process: url is undefined, expected a url$/],
    [JSON.stringify({ ...own, free_bytes: -1 }), /free_bytes is -1, expected a count$/],
  ] as const)
    t.throws(() => readAnnouncement(text, 'key'), { message: problem })
})

t.test('of entries the newest are kept', async (t) => {
  const newest = new NewestEntries<number>(2)
  for (const [i, key] of ['a', 'b', 'a', 'c'].entries()) newest.set(key, i)
  t.same(
    ['a', 'b', 'c'].map((key) => newest.get(key)),
    [2, undefined, 3],
  )
})

t.test('credentials of etcd come from files', async (t) => {
  const setting = readCluster('etcds://127.0.0.1:1/muond')
  const folder = t.testdir({ password: 'secret\n' })
  for (const name of ['ca', 'cert', 'key'] as const)
    await t.rejects(openCoordinator(setting, { ...NO_CREDENTIALS, [name]: `${folder}/none` }, OPTIONS), {
      name: 'ConfigError',
      message: new RegExp(`^etcd_${name} '.*none' cannot be read: ENOENT`),
    })
  const credentials = { ...NO_CREDENTIALS, user: 'muond', password_file: `${folder}/none` }
  await t.rejects(openCoordinator(setting, credentials, OPTIONS), {
    message: /^etcd_password_file '.*none' cannot be read/,
  })
  const files = { ca: 'test/golden/tls/ca.pem', cert: 'test/golden/tls/client.pem', key: 'test/golden/tls/client.key' }
  const certified = await openCoordinator(setting, { ...NO_CREDENTIALS, ...files }, OPTIONS)
  await t.rejects(certified.start(), { message: /ECONNREFUSED/ })
  const opened = await openCoordinator(setting, { ...credentials, password_file: `${folder}/password` }, OPTIONS)
  await t.rejects(opened.start(), {
    name: 'ConfigError',
    message: /^etcds:\/\/127\.0\.0\.1:1\/muond cannot be reached/,
  })
  await opened.stop()
})

t.test('a configuration of Kubernetes has a cluster', async (t) => {
  const KUBECONFIG = `${t.testdir({ config: '{"apiVersion":"v1","kind":"Config","current-context":"gone"}' })}/config`
  const { KUBECONFIG: before } = process.env
  Object.assign(process.env, { KUBECONFIG })
  t.teardown(() => {
    if (before === undefined) delete process.env.KUBECONFIG
    else process.env.KUBECONFIG = before
  })
  await t.rejects(openCoordinator(readCluster('kubernetes'), NO_CREDENTIALS, OPTIONS), {
    name: 'ConfigError',
    message: "the configuration of Kubernetes has no cluster for its context 'gone'",
  })
})
