import t from 'tap'
import { AssignmentFiles } from '../../../src/cluster/coordinator/static/assignment-files.js'
import { StaticCoordinator } from '../../../src/cluster/coordinator/static/static.js'
import { runSuite } from './cases.js'
import { staticCluster } from './static-cluster.js'
import { openStatic } from './static-member.js'

runSuite({ name: 'static', cluster: staticCluster }, 'static')

const report = () => ({ free_bytes: 1, device: 'cpu' })
const [ONE, OTHER] = ['http://127.0.0.1:1', 'http://127.0.0.1:2']

t.test('a process is one of its peers', async (t) => {
  const assignments = new AssignmentFiles(undefined)
  const options = { url: ONE, urls: [OTHER], lease_seconds: 1, report, assignments, probe: () => Promise.reject() }
  t.throws(() => new StaticCoordinator(options), {
    name: 'ConfigError',
    message: `peers has ${OTHER}, and advertise is ${ONE}: this process must be one of its peers`,
  })
})

t.test('only the head of a run keeps its assignment', async (t) => {
  const urls = [ONE, OTHER]
  const assignments = new AssignmentFiles(undefined)
  const options = { urls, lease_seconds: 1, report, assignments, probe: () => Promise.reject() }
  const [one, other] = urls.map((url) => new StaticCoordinator({ ...options, url }))
  const head = await one!.headOf('gpt')
  const [itself, notIt] = head === ONE ? [one!, other!] : [other!, one!]
  const assignment = { run: 'gpt', generation: 1, shards: [] }
  await t.rejects(notIt.writeAssignment('gpt', assignment, undefined), {
    message: `${head} keeps the assignment of run 'gpt', not ${head === ONE ? OTHER : ONE}`,
  })
  await t.rejects(notIt.removeAssignment('gpt', '1'), { message: /keeps the assignment/ })
  // Without a folder it ends with the process.
  t.equal(await itself.writeAssignment('gpt', assignment, undefined), true)
  const { version } = (await itself.readAssignment('gpt'))!
  t.equal(await itself.removeAssignment('gpt', version), true)
  t.equal(await itself.readAssignment('gpt'), undefined)
})

t.test('a folder that cannot be read is not one without assignments', async (t) => {
  const folder = t.testdir({ 'gpt.json': {} })
  await t.rejects(new AssignmentFiles(folder).read('gpt'), { code: 'EISDIR' })
})

t.test('lists of peers that differ are told by the process whose probe finds it', async (t) => {
  const cluster = await staticCluster()
  const [a, b, c] = ['a', 'b', 'c'].map(cluster.urlOf)
  const { coordinator: other, server } = await openStatic({ url: b!, urls: [b!, c!].sort(), report })
  const own = await cluster.open('a')
  t.teardown(() => cluster.close())
  await own.start()
  t.match(
    own.problem(),
    `the peers of ${b} are ${[b, c].sort().join(', ')}, of this process ${[a, b, c].sort().join(', ')}`,
  )
  await other.stop()
  await own.stop()
  server!.close()
})
