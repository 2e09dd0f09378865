import { randomBytes } from 'node:crypto'
import { mkdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { Gate } from './gate.js'
import { type Server, startServer } from './server.js'
import { FLAGS } from './site.js'
import { type Outcome, Trainer, type TrainerOptions } from './trainer.js'

/** A process of the cluster: where others reach it is always the same, whichever process is behind it. */
type Member = { gate: Gate; data: string; log: string; server: Server | undefined }

/** Several services that know each other, each with a data folder of its own and a journal. */
export class Cluster {
  readonly #members: readonly Member[]
  readonly #key = randomBytes(24).toString('base64url')

  static async start(folder: string, processes: number): Promise<Cluster> {
    const members = await Promise.all(
      Array.from({ length: processes }, async (_, i) => {
        const data = join(folder, `data-${i}`)
        mkdirSync(data, { recursive: true })
        return { gate: await Gate.start(), data, log: join(folder, `server-${i}.log`), server: undefined }
      }),
    )
    const cluster = new Cluster(members)
    await Promise.all(members.map((_, i) => cluster.start(i)))
    return cluster
  }

  private constructor(members: readonly Member[]) {
    this.#members = members
  }

  get size(): number {
    return this.#members.length
  }

  /** The address of a process for clients. */
  url(i: number): string {
    return this.#members[i].gate.origin.replace('http', 'ws')
  }

  gate(i: number): Gate {
    return this.#members[i].gate
  }

  signal(i: number, signal: NodeJS.Signals): void {
    this.#members[i].server?.signal(signal)
  }

  /** kill -9. */
  async kill(i: number): Promise<void> {
    const { gate, server } = this.#members[i]
    gate.target = undefined
    await server?.end('SIGKILL')
  }

  /** Starts a process on its folder, for the first time or again. */
  async start(i: number): Promise<void> {
    const member = this.#members[i]
    const { gate, data, log } = member
    const peers = this.#members.map((one) => one.gate.origin).join(',')
    const server = await startServer({
      ...{ data, log, env: { MUOND_CLUSTER_KEY: this.#key } },
      flags: [...FLAGS, '--durability', 'journal', '--peers', peers, '--advertise', gate.origin],
    })
    if (server.port === undefined)
      throw new Error(`process ${i} ended before it listened: ${(await server.exited).lines.join(' ')}`)
    member.server = server
    gate.target = server.port
  }

  /** The process that commits the steps of a run. */
  async headOf(run: string): Promise<number> {
    const found = await Promise.all(
      this.#members.map(async ({ gate }) => (await fetch(`${gate.origin}/v1/runs/${run}/shards`)).ok),
    )
    const head = found.indexOf(true)
    if (head < 0) throw new Error(`no process is the head of run '${run}'`)
    return head
  }

  trainer(run: string, signal: AbortSignal, options: Partial<TrainerOptions> = {}): Trainer {
    const control = () => this.#members[0].gate.origin
    return new Trainer({ url: this.url(0), control, run, signal, open: { shards: this.size }, ...options })
  }

  train(run: string, signal: AbortSignal): Promise<Outcome> {
    return this.trainer(run, signal).train()
  }

  /** Ends all processes, and removes their folders where nobody has to look at them. */
  async close({ keep }: { keep: boolean }): Promise<void> {
    for (const { gate, server, data } of this.#members) {
      server?.signal('SIGCONT')
      await server?.end('SIGKILL')
      await gate.close()
      if (!keep) rmSync(data, { recursive: true, force: true })
    }
  }
}
