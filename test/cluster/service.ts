import { mkdtempSync, rmSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { type App, buildApp } from '../../src/app.js'
import type { WholeBody } from '../../src/cluster/peers/calls.js'
import { configOf, type SettingName } from '../../src/config.js'

export const CLUSTER_KEY = 'a-key-of-the-cluster-alone'

export type Settings = Partial<Record<SettingName, string | number>>

/** A process of a cluster: the real service on the CPU, which can be stopped and started again at the same address. */
export class Process {
  readonly peer: string
  readonly url: string
  readonly #settings: Settings
  #app: App | undefined

  constructor(peer: string, settings: Settings) {
    this.peer = peer
    this.url = peer.replace('http', 'ws')
    this.#settings = { advertise: peer, port: Number(new URL(peer).port), ...settings }
  }

  /** Its data folder, if it has one. */
  get data(): string {
    return String(this.#settings.data)
  }

  get app(): App {
    /* c8 ignore next -- a mistake in a test */
    if (!this.#app) throw new Error(`${this.peer} does not run`)
    return this.#app
  }

  async start(settings: Settings = {}): Promise<this> {
    const config = configOf({ device: 'cpu', lanes: 1, threads: 1, ...this.#settings, ...settings })
    this.#app = await buildApp({ config })
    await this.#app.app.listen({ host: '127.0.0.1', port: config.port })
    return this
  }

  /** Ends it; steps that are on no disk are lost. */
  async stop(): Promise<void> {
    const app = this.#app
    this.#app = undefined
    await app?.app.close()
  }
}

/** Ports that were free a moment ago: processes have to know each other's before they start. */
async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'))
  await Promise.all(servers.map((server) => new Promise((resolve) => server.once('listening', resolve))))
  const ports = servers.map((server) => (server.address() as AddressInfo).port)
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))))
  return ports
}

export type ClusterOptions = Settings & {
  /** Each process has a data folder of its own. */
  keeps?: boolean
}

/** Processes that know each other, all started. */
export async function startCluster(t: Test, count: number, { keeps = false, ...settings }: ClusterOptions = {}) {
  const peers = (await freePorts(count)).map((port) => `http://127.0.0.1:${port}`)
  const folder = keeps ? mkdtempSync(join(tmpdir(), 'muond-')) : ''
  const processes = peers.map((peer, i) => {
    const data = keeps ? { data: join(folder, String(i)) } : {}
    return new Process(peer, { peers: peers.join(','), cluster_key: CLUSTER_KEY, ...data, ...settings })
  })
  await Promise.all(processes.map((process) => process.start()))
  t.teardown(async () => {
    await Promise.all(processes.map((process) => process.stop()))
    if (keeps) rmSync(folder, { recursive: true })
  })
  return processes
}

/** What the head of a run says of its shards, whichever process that is. */
export async function wholeOf(processes: readonly Process[], run: string): Promise<{ head: Process; body: WholeBody }> {
  for (const head of processes) {
    const response = await fetch(`${head.peer}/v1/runs/${run}/shards`)
    if (response.ok) return { head, body: (await response.json()) as WholeBody }
  }
  throw new Error(`no process is the head of run '${run}'`)
}
