import { type ChildProcess, spawn } from 'node:child_process'
import { generateKeyPairSync } from 'node:crypto'
import { once } from 'node:events'
import { createWriteStream } from 'node:fs'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { requestJson } from '../../src/cluster/coordinator/json-request.js'
import { EtcdServer } from '../cluster/coordinator/etcd-server.js'
import { freePorts } from '../cluster/coordinator/ports.js'

const TLS = resolve('test/golden/tls')
const READY_MS = 120_000
/** May do everything. */
export const ADMIN = 'admin-token'

/** A user of the API server, as its file of tokens has one. */
export type User = { readonly token: string; readonly name: string; readonly groups: string }

/** A real kube-apiserver with a real etcd, and no other part of Kubernetes. */
export class ApiServer {
  readonly port: number
  readonly ca = join(TLS, 'ca.pem')
  readonly #etcd: EtcdServer
  readonly #folder: string
  readonly #command: readonly string[]
  #process: ChildProcess

  static async start(binary: string, users: readonly User[]): Promise<ApiServer> {
    const etcd = await EtcdServer.start()
    const [port = 0] = await freePorts(1)
    const folder = await mkdtemp(join(tmpdir(), 'muond-apiserver-'))
    const all = [{ token: ADMIN, name: 'admin', groups: 'system:masters' }, ...users]
    const tokens = all.map(({ token, name, groups }) => `${token},${name},${name},"${groups}"\n`)
    await writeFile(join(folder, 'tokens.csv'), tokens.join(''))
    const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 })
    await writeFile(join(folder, 'service-account.key'), privateKey.export({ type: 'pkcs8', format: 'pem' }))
    const server = new ApiServer({ port, folder, etcd, command: [binary, ...flagsOf(port, folder, etcd.url)] })
    await server.#ready()
    return server
  }

  private constructor(of: { port: number; folder: string; etcd: EtcdServer; command: readonly string[] }) {
    this.port = of.port
    this.#folder = of.folder
    this.#etcd = of.etcd
    this.#command = of.command
    this.#process = this.#spawn()
  }

  async call(method: 'GET' | 'POST' | 'PUT' | 'DELETE', path: string, body?: unknown, token = ADMIN) {
    const tls = { ca: await readFile(this.ca, 'utf8') }
    const headers = { authorization: `Bearer ${token}` }
    const url = new URL(`https://127.0.0.1:${this.port}${path}`)
    return requestJson({ url, method, body, tls, headers, timeout_ms: 10_000 })
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
    await this.#etcd.close()
    await rm(this.#folder, { recursive: true })
  }

  #spawn(): ChildProcess {
    const [binary = '', ...flags] = this.#command
    const child = spawn(binary, flags, { stdio: ['ignore', 'ignore', 'pipe'] })
    child.stderr!.pipe(createWriteStream(join(this.#folder, 'log'), { flags: 'a' }))
    return child
  }

  async #ready(): Promise<void> {
    const deadline = performance.now() + READY_MS
    while (!(await this.#isReady())) {
      if (this.#process.exitCode !== null || performance.now() > deadline)
        throw new Error(
          `kube-apiserver is not ready: ${(await readFile(join(this.#folder, 'log'), 'utf8')).slice(-2000)}`,
        )
      await delay(200)
    }
  }

  async #isReady(): Promise<boolean> {
    // readyz answers text, which is no JSON; a list says that RBAC has its first rules, too.
    const answer = await this.call('GET', '/api/v1/namespaces/default').catch(() => undefined)
    return answer?.status === 200
  }
}

function flagsOf(port: number, folder: string, etcd: string): string[] {
  const key = join(folder, 'service-account.key')
  return [
    ...[`--etcd-servers=${etcd}`, '--bind-address=127.0.0.1', `--secure-port=${port}`],
    ...[`--tls-cert-file=${TLS}/server.pem`, `--tls-private-key-file=${TLS}/server.key`, `--cert-dir=${folder}`],
    ...[`--token-auth-file=${join(folder, 'tokens.csv')}`, '--authorization-mode=RBAC'],
    ...['--service-account-issuer=https://kubernetes.default.svc', `--service-account-key-file=${key}`],
    ...[`--service-account-signing-key-file=${key}`, '--service-cluster-ip-range=10.0.0.0/24'],
    // Nothing here gives a namespace its service account.
    ...['--disable-admission-plugins=ServiceAccount', '--endpoint-reconciler-type=none'],
  ]
}
