import { once } from 'node:events'
import { createServer, type Server } from 'node:http'
import type { PeerReport } from '../../../src/cluster/coordinator/coordinator.js'
import { AssignmentFiles } from '../../../src/cluster/coordinator/static/assignment-files.js'
import { probePeer } from '../../../src/cluster/coordinator/static/probe.js'
import { StaticCoordinator } from '../../../src/cluster/coordinator/static/static.js'
import { LEASE_SECONDS } from './cluster.js'

export type StaticMember = { readonly coordinator: StaticCoordinator; readonly server: Server | undefined }

/** A process with static peers that answers probes at its url. While `isCut` it asks nobody. */
export async function openStatic({
  url,
  urls,
  report,
  folder,
  isCut,
  answers = true,
}: {
  url: string
  urls: readonly string[]
  report: () => PeerReport
  folder?: string
  isCut?: () => boolean
  /** A second process of one url does not get its port. */
  answers?: boolean
}): Promise<StaticMember> {
  const probe = async (url: string, signal: AbortSignal) => {
    if (isCut?.()) throw new Error('cut')
    return probePeer(url, 'the key of the cluster', signal)
  }
  const assignments = new AssignmentFiles(folder)
  const coordinator = new StaticCoordinator({ url, urls, lease_seconds: LEASE_SECONDS, report, probe, assignments })
  if (!answers) return { coordinator, server: undefined }
  const server = createServer((_request, response) => {
    response.end(JSON.stringify(coordinator.answer()))
  })
  server.listen(Number(new URL(url).port), '127.0.0.1')
  await once(server, 'listening')
  return { coordinator, server }
}
