// A process of a cluster, for the suite: `member.js leased CLUSTER URL LEASE_SECONDS` or `member.js static URL URLS`.
import { readCluster } from '../../../src/cluster/coordinator/cluster-setting.js'
import type { Coordinator } from '../../../src/cluster/coordinator/coordinator.js'
import { openCoordinator } from '../../../src/cluster/coordinator/open.js'
import { openStatic } from './static-member.js'

const [kind, first = '', second = '', seconds] = process.argv.slice(2)
const report = () => ({ free_bytes: 7, device: 'cpu' })
const none = { ca: '', cert: '', key: '', user: '', password_file: '' }

async function open(): Promise<Coordinator> {
  if (kind === 'static') return (await openStatic({ url: first, urls: second.split(','), report })).coordinator
  return openCoordinator(readCluster(first), none, { url: second, lease_seconds: Number(seconds), report })
}

const coordinator = await open()
await coordinator.start()
process.on('message', () => process.send?.({ problem: coordinator.problem() }))
process.send?.('started')
