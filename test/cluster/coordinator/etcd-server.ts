import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { freePorts } from './ports.js'

/** The words of etcd 3.4, and of later ones. */
const SERVING = /serving (insecure )?client (requests|traffic)/

/** A real etcd of one member, with a folder of its own: Debian's package etcd-server, or the `etcd` that is there. */
export class EtcdServer {
  readonly port: number
  readonly url: string
  readonly #args: readonly string[]
  readonly #folder: string
  #process: ChildProcess

  /** With TLS, `flags` have its files. */
  static async start({ flags = [], scheme = 'http' }: { flags?: readonly string[]; scheme?: string } = {}) {
    const [port = 0, peer = 0] = await freePorts(2)
    const folder = await mkdtemp(join(tmpdir(), 'muond-etcd-'))
    const url = `${scheme}://127.0.0.1:${port}`
    const peers = `http://127.0.0.1:${peer}`
    const args = [
      ...['--name', 'test', '--data-dir', folder],
      ...['--listen-client-urls', url, '--advertise-client-urls', url],
      ...['--listen-peer-urls', peers, '--initial-advertise-peer-urls', peers, '--initial-cluster', `test=${peers}`],
      ...flags,
    ]
    const server = new EtcdServer({ port, url, args, folder })
    await server.#ready()
    return server
  }

  private constructor(of: { port: number; url: string; args: readonly string[]; folder: string }) {
    this.port = of.port
    this.url = of.url
    this.#args = of.args
    this.#folder = of.folder
    this.#process = this.#spawn()
  }

  /** Starts it again, with what it has on the disk. */
  async start(): Promise<void> {
    this.#process = this.#spawn()
    await this.#ready()
  }

  async kill(): Promise<void> {
    const ended = once(this.#process, 'exit')
    this.#process.kill('SIGKILL')
    await ended
  }

  async close(): Promise<void> {
    await this.kill()
    await rm(this.#folder, { recursive: true })
  }

  #spawn(): ChildProcess {
    return spawn('etcd', this.#args, { stdio: ['ignore', 'ignore', 'pipe'] })
  }

  async #ready(): Promise<void> {
    const lines = createInterface({ input: this.#process.stderr! })
    for await (const line of lines) if (SERVING.test(line)) break
    // Nobody reads further lines, and they must not fill the pipe.
    this.#process.stderr!.resume()
  }
}
