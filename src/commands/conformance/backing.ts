import { mkdtemp, rm } from 'node:fs/promises'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type App, buildApp } from '../../app.js'
import { configOf } from '../../config.js'

/** Not a multiple of an element, and so small that most gradients have several chunks. */
export const CHUNK_BYTES = 250

/** The service behind the stage: the real one, on the CPU, at a port of its own and with a folder that ends with it. */
export class Backing {
  readonly #app: App
  readonly #data: string

  static async start(): Promise<Backing> {
    const data = await mkdtemp(join(tmpdir(), 'muond-conformance-'))
    const config = configOf({ device: 'cpu', lanes: 1, threads: 1, port: 0, chunk_bytes: CHUNK_BYTES, data })
    const app = await buildApp({ config })
    await app.app.listen({ host: '127.0.0.1', port: 0 })
    return new Backing(app, data)
  }

  private constructor(app: App, data: string) {
    this.#app = app
    this.#data = data
  }

  get port(): number {
    return (this.#app.app.server.address() as AddressInfo).port
  }

  /** Whether upgrades and new steps are refused with DRAINING. */
  set draining(value: boolean) {
    this.#app.runs.draining = value
  }

  deleteRun(name: string): Promise<void> {
    return this.#app.runs.delete(name)
  }

  async deleteRuns(): Promise<void> {
    for (const { name } of this.#app.runs.list()) await this.deleteRun(name)
  }

  async close(): Promise<void> {
    await this.#app.app.close()
    await rm(this.#data, { recursive: true, force: true })
  }
}
