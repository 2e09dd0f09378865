import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import type { Coordinator, PeerReport } from '../../../src/cluster/coordinator/coordinator.js'

/** A cluster for one case of the suite, which no other case sees. */
export type TestCluster = {
  /** `leased`: by a system between the processes. `static`: by a list, and probes from one to the other. */
  readonly kind: 'leased' | 'static'
  /** The url of a process; a static cluster has those of `HOSTS`. */
  urlOf(host: string): string
  /** A process of the cluster, in this process, that is not started. It goes through `partition`. */
  open(host: string, report?: () => PeerReport): Promise<Coordinator>
  /** The same in a process of its own, which is started. */
  fork(host: string): Promise<Child>
  /** Cuts the way from all processes in this one to the coordinator, or to their peers. */
  partition(): Promise<void>
  heal(): Promise<void>
  /** The next requests to the coordinator, or its answers, do not arrive. */
  readonly lose?: { requests(count: number): void; answers(count: number): void }
  /** Puts a text where the assignment of a run is. */
  spoil(run: string, content: string): Promise<void>
  /** Bytes that an assignment may have; undefined where nothing limits them. */
  readonly mostBytes: number | undefined
  close(): Promise<void>
}

/** What the suite is run against; `coordinator` ends, and is started with what it has on the disk. */
export type Subject = {
  readonly name: string
  cluster(): Promise<TestCluster>
  readonly coordinator?: { kill(): Promise<void>; start(): Promise<void> }
}

export const HOSTS = ['a', 'b', 'c']
/** Of processes that a busy machine may keep waiting for a second. */
export const LEASE_SECONDS = 3

/** A forked process of a cluster. */
export class Child {
  readonly url: string
  readonly #process: ChildProcess

  /** Starts `member.js` with the arguments, which is announced when this resolves. */
  static async start(url: string, args: readonly string[], env: NodeJS.ProcessEnv): Promise<Child> {
    const child = fork(new URL('./member.js', import.meta.url), args, { env: { ...process.env, ...env } })
    const [said] = await Promise.race([once(child, 'message'), once(child, 'exit')])
    /* c8 ignore next -- a process that does not start fails the test */
    if (said !== 'started') throw new Error(`a forked process ended with ${said}`)
    return new Child(url, child)
  }

  private constructor(url: string, child: ChildProcess) {
    this.url = url
    this.#process = child
  }

  /** As a scheduler, or a virtual machine that is moved, would pause it. */
  pause(): void {
    this.#process.kill('SIGSTOP')
  }

  resume(): void {
    this.#process.kill('SIGCONT')
  }

  async kill(): Promise<void> {
    const ended = once(this.#process, 'exit')
    this.#process.kill('SIGKILL')
    await ended
  }

  /** What its `problem()` says. */
  async problem(): Promise<string | undefined> {
    const answer = once(this.#process, 'message')
    this.#process.send('problem')
    const [{ problem }] = await answer
    return problem
  }
}
