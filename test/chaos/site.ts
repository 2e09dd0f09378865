import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { FrameProxy } from './proxy.js'
import { type Exit, type Server, type ServerOptions, startServer } from './server.js'
import { type Outcome, Trainer, type TrainerOptions } from './trainer.js'

export type Durability = 'checkpoint' | 'journal'

/** Small files and many checkpoints, so that a kill often interrupts the writing of one. */
export const FLAGS = ['--checkpoint-steps', '2', '--checkpoint-file-bytes', '256', '--chunk-bytes', '4096']

export type SiteOptions = { folder: string; durability: Durability } & Partial<ServerOptions>

/** A service with its data folder, and a proxy through which clients reach it at one address, also after a restart. */
export class Site {
  readonly data: string
  readonly log: string
  readonly durability: Durability
  readonly proxy: FrameProxy
  #server: Server | undefined
  readonly #options: ServerOptions

  static async start(options: SiteOptions): Promise<Site> {
    const site = new Site(options, await FrameProxy.start())
    await site.start()
    return site
  }

  private constructor({ folder, durability, flags = [], ...rest }: SiteOptions, proxy: FrameProxy) {
    const data = join(folder, 'data')
    const log = join(folder, 'server.log')
    this.#options = { data, log, ...rest, flags: [...FLAGS, '--durability', durability, ...flags] }
    this.data = this.#options.data
    this.log = this.#options.log
    this.durability = durability
    this.proxy = proxy
  }

  get server(): Server {
    if (this.#server) return this.#server
    throw new Error('the service was not started')
  }

  /** The address of REST. */
  readonly control = () => `http://127.0.0.1:${this.server.port}`

  /** Starts the service on the folder, for the first time or again, and leads the proxy to it. */
  async start(): Promise<Server> {
    const server = await startServer(this.#options)
    this.#server = server
    if (server.port === undefined)
      throw new Error(`the service ended before it listened: ${(await server.exited).lines.join(' ')}`)
    this.proxy.target = server.port
    return server
  }

  /** Starts the service and kills it so long after it has begun to listen. */
  async startBriefly(milliseconds: number): Promise<void> {
    const server = await this.start()
    await delay(milliseconds)
    this.proxy.target = undefined
    await server.end('SIGKILL')
  }

  /** kill -9. */
  kill(): Promise<Exit> {
    this.proxy.target = undefined
    return this.server.end('SIGKILL')
  }

  trainer(run: string, signal: AbortSignal, options: Partial<TrainerOptions> = {}): Trainer {
    return new Trainer({ url: this.proxy.url, control: this.control, run, signal, ...options })
  }

  train(run: string, signal: AbortSignal, options: Partial<TrainerOptions> = {}): Promise<Outcome> {
    return this.trainer(run, signal, options).train()
  }

  async remove(run: string): Promise<void> {
    const { status } = await fetch(`${this.control()}/v1/runs/${run}`, { method: 'DELETE' })
    if (status !== 204) throw new Error(`DELETE of run '${run}' answered ${status}, expected 204`)
  }

  /** Ends service and proxy; the folder stays. */
  async close(): Promise<void> {
    await this.#server?.end('SIGKILL')
    await this.proxy.close()
  }

  /** Ends service and proxy and removes the folder. */
  async clear(): Promise<void> {
    await this.close()
    rmSync(this.data, { recursive: true, force: true })
  }
}
