import { once } from 'node:events'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { type AddressInfo, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Coordinator } from '../../../src/cluster/coordinator/coordinator.js'
import { Child, HOSTS, type TestCluster } from './cluster.js'
import { openStatic, type StaticMember } from './static-member.js'

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

/** Processes that know each other by a list, and answer each other's probes over HTTP. */
export async function staticCluster(): Promise<TestCluster> {
  const entries: [string, string][] = []
  for (const host of HOSTS) entries.push([host, `http://127.0.0.1:${await freePort()}`])
  const urls = new Map(entries)
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
