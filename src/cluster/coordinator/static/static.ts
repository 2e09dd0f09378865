import { randomUUID } from 'node:crypto'
import { EventEmitter } from 'node:events'
import { ConfigError } from '../../../config.js'
import type { Assignment } from '../../assignment.js'
import type { Coordinator, CoordinatorEvents, Peer, PeerReport, Versioned } from '../coordinator.js'
import { Looks } from '../looks.js'
import { highestRendezvous } from '../rendezvous.js'
import type { AssignmentFiles } from './assignment-files.js'

/** What a process answers to the probe of another one. */
export type ProbeAnswer = PeerReport & {
  /** New with each start of the process. */
  readonly incarnation: string
  /** All peers that it knows, itself among them, as `peerUrls` writes them. */
  readonly peers: readonly string[]
}

export type StaticOptions = {
  /** The url of this process, for the others. */
  readonly url: string
  /** Of all processes, as `peerUrls` writes them; every process has the same. */
  readonly urls: readonly string[]
  /** A peer that has answered no probe for so long is taken for dead. */
  readonly lease_seconds: number
  report(): PeerReport
  /** Asks a peer for its `answer()`. Throws where it does not come before `signal` ends. */
  probe(url: string, signal: AbortSignal): Promise<ProbeAnswer>
  /** Where the assignments are kept of the runs whose head this process is. */
  readonly assignments: AssignmentFiles
}

type Seen = { readonly peer: Peer; readonly at: number }

/**
 * Processes that know each other by a list, without a coordinator between them. The head of a run is a function of its
 * name and of the list, whoever is alive, and alone keeps the run's assignment: so a run whose head is down waits for
 * it, and nothing has to be agreed upon. It holds as long as all lists are equal, and two heads of one run would share
 * no fence; so each probe compares them, and `problem()` tells.
 */
export class StaticCoordinator implements Coordinator {
  readonly changes = new EventEmitter<CoordinatorEvents>()
  readonly #options: StaticOptions
  readonly #incarnation = randomUUID()
  readonly #looks: Looks
  readonly #seen = new Map<string, Seen>()
  readonly #problems = new Map<string, string>()

  constructor(options: StaticOptions) {
    const { url, urls, lease_seconds } = options
    if (!urls.includes(url))
      throw new ConfigError(
        `peers has ${urls.join(', ')}, and advertise is ${url}: this process must be one of its peers`,
      )
    this.#options = options
    this.#looks = new Looks(lease_seconds, () => this.#look())
  }

  /** The answer to the probes of others. */
  answer(): ProbeAnswer {
    return { ...this.#options.report(), incarnation: this.#incarnation, peers: this.#options.urls }
  }

  async start(): Promise<void> {
    await this.#look()
    this.#looks.start()
  }

  async stop(): Promise<void> {
    await this.#looks.stop()
  }

  peers(): readonly Peer[] {
    const { url, report } = this.#options
    const own = { url, ...report(), renewed_at: Date.now() / 1000 }
    return [own, ...this.#living()].sort((one, other) => (one.url < other.url ? -1 : 1))
  }

  problem(): string | undefined {
    const problems = [...this.#problems.values()]
    return problems.length === 0 ? undefined : problems.join('; ')
  }

  async readAssignment(run: string): Promise<Versioned<Assignment> | undefined> {
    return this.#options.assignments.read(run)
  }

  /** Throws where this process is not the head of the run: only the head's folder has the assignment. */
  async writeAssignment(run: string, assignment: Assignment, version: string | undefined): Promise<boolean> {
    this.#checkHead(run)
    return this.#options.assignments.write(run, assignment, version)
  }

  async removeAssignment(run: string, version: string): Promise<boolean> {
    this.#checkHead(run)
    return this.#options.assignments.remove(run, version)
  }

  async headOf(run: string): Promise<string> {
    return highestRendezvous(run, this.#options.urls)
  }

  /** Asks all others at once; a probe that is answered after a third of a lease is as good as none. */
  async #look(): Promise<void> {
    const before = [this.#alive(), this.problem()]
    const { url, urls } = this.#options
    await Promise.all(urls.map((each) => (each === url ? this.#lookAtOwn() : this.#lookAt(each))))
    if (this.#alive() !== before[0]) this.changes.emit('peers')
    if (this.problem() !== before[1]) this.changes.emit('problem')
    this.changes.emit('look')
  }

  async #lookAt(url: string): Promise<void> {
    const answer = await this.#ask(url)
    if (answer === undefined) return
    const { free_bytes, device, peers } = answer
    this.#seen.set(url, {
      peer: { url, free_bytes, device, renewed_at: Date.now() / 1000 },
      at: performance.now(),
    })
    const [theirs, ours] = [peers.join(', '), this.#options.urls.join(', ')]
    this.#tell(
      url,
      theirs === ours ? undefined : `the peers of ${url} are ${theirs}, of this process ${ours}: give all the same`,
    )
  }

  /** Where another process answers at the url of this one, two have one name, or the url is wrong. */
  async #lookAtOwn(): Promise<void> {
    const { url } = this.#options
    const answer = await this.#ask(url)
    if (answer === undefined) return
    const isOwn = answer.incarnation === this.#incarnation
    this.#tell(url, isOwn ? undefined : `another process answers at ${url}, as which this one is advertised`)
  }

  #tell(url: string, problem: string | undefined): void {
    if (problem === undefined) this.#problems.delete(url)
    else this.#problems.set(url, problem)
  }

  /** Undefined where a peer does not answer: that it is down is no problem of this process. */
  async #ask(url: string): Promise<ProbeAnswer | undefined> {
    try {
      return await this.#options.probe(url, AbortSignal.timeout(this.#looks.pause_ms))
    } catch {
      return undefined
    }
  }

  #living(): readonly Peer[] {
    const since = performance.now() - this.#options.lease_seconds * 1000
    return [...this.#seen.values()].filter(({ at }) => at > since).map(({ peer }) => peer)
  }

  #alive(): string {
    return this.peers()
      .map(({ url }) => url)
      .join(' ')
  }

  #checkHead(run: string): void {
    const { url, urls } = this.#options
    const head = highestRendezvous(run, urls)
    if (head !== url) throw new Error(`${head} keeps the assignment of run '${run}', not ${url}`)
  }
}
