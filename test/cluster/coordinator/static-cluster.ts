import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Coordinator } from '../../../src/cluster/coordinator/coordinator.js'
import { Child, HOSTS, type TestCluster } from './cluster.js'
import { freePorts } from './ports.js'
import { openStatic, type StaticMember } from './static-member.js'

/** Ports that no cluster of this process was given before. */
const given = new Set<number>()

async function unusedPorts(count: number): Promise<number[]> {
  const ports = await freePorts(count)
  /* c8 ignore next -- the kernel gives a port twice */
  if (ports.some((port) => given.has(port))) return unusedPorts(count)
  for (const port of ports) given.add(port)
  return ports
}

/** Processes that know each other by a list, and answer each other's probes over HTTP. */
export async function staticCluster(): Promise<TestCluster> {
  // Peers are in the order of their urls, and that is to be the order of their names.
  const ports = (await unusedPorts(HOSTS.length)).sort((one, other) => one - other)
  const urls = new Map(HOSTS.map((host, i) => [host, `http://127.0.0.1:${ports[i]}`]))
  const urlOf = (host: string) => urls.get(host)!
  const folder = await mkdtemp(join(tmpdir(), 'muond-static-'))
  const members = new Map<string, StaticMember>()
  let isCut = false
  const list = [...urls.values()].sort()
  const folderOf = (host: string) => join(folder, host)
  return {
    kind: 'static',
    urlOf,
    mostBytes: undefined,
    open: async (host, report = () => ({ free_bytes: 1, device: 'cpu' })) => {
      const options = { url: urlOf(host), urls: list, report, folder: folderOf(host), isCut: () => isCut }
      const member = await openStatic({ ...options, answers: !members.has(host) })
      if (!members.has(host)) members.set(host, member)
      return closing(member)
    },
    fork: (host) => Child.start(urlOf(host), ['static', urlOf(host), list.join(',')], {}),
    partition: async () => {
      isCut = true
    },
    heal: async () => {
      isCut = false
    },
    spoil: async (run, content) => {
      await mkdir(folderOf('a'), { recursive: true })
      await writeFile(join(folderOf('a'), `${run}.json`), content)
    },
    close: () => rm(folder, { recursive: true }),
  }
}

/** A process that stops answers no probes any more. */
function closing({ coordinator, server }: StaticMember): Coordinator {
  const stop = coordinator.stop.bind(coordinator)
  coordinator.stop = async () => {
    await stop()
    server?.closeAllConnections()
    server?.close()
  }
  return coordinator
}
