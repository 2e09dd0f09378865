import { statSync } from 'node:fs'
import { readClusterKey } from '../../../access/cluster-key.js'
import type { Config } from '../../../config.js'
import { causeText } from '../../../errors.js'
import { type Finding, finding, ok, warning } from './finding.js'

const OTHERS_MAY_READ = 0o077
const MOST_MS = 2000

/** The key of the cluster, and the other processes of it: one that is not there yet keeps no start from succeeding. */
export async function checkCluster(config: Config): Promise<Finding[]> {
  const { peers, advertise } = config
  if (peers.length === 0) return []
  const remedy = 'one file in all processes: openssl rand -hex 32 > FILE'
  const key = await finding('cluster key', remedy, () => keyOf(config))
  const others = peers.filter((peer) => peer !== advertise)
  return [...key, ...(await Promise.all(others.map(checkPeer)))]
}

function keyOf(config: Config): Finding {
  readClusterKey(config)
  const { cluster_key_file: path } = config
  if (path === '') return ok('cluster key', 'in MUOND_CLUSTER_KEY')
  const { mode } = statSync(path)
  if ((mode & OTHERS_MAY_READ) === 0) return ok('cluster key', path)
  const found = `${path} has mode ${(mode & 0o777).toString(8)}: others than its owner reach the key`
  return warning('cluster key', found, `chmod 600 ${path}`)
}

async function checkPeer(peer: string): Promise<Finding> {
  try {
    const { status } = await fetch(`${peer}/livez`, { signal: AbortSignal.timeout(MOST_MS), redirect: 'error' })
    if (status === 200) return ok('peer', peer)
    return warning('peer', `${peer} answers /livez with HTTP status ${status}`, 'is it a process of muond?')
  } catch (error) {
    const reason = causeText(error)
    return warning(
      'peer',
      `${peer} does not answer: ${reason}`,
      'steps of a run wait for all processes that have shards of it',
    )
  }
}
