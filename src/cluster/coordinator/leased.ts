import { randomUUID } from 'node:crypto'
import { EventEmitter } from 'node:events'
import { ConfigError } from '../../config.js'
import { errorText, ServiceError } from '../../errors.js'
import type { Rule } from '../../store/rules.js'
import type { Assignment } from '../assignment.js'
import type { Coordinator, CoordinatorEvents, Peer, PeerReport, Versioned } from './coordinator.js'
import { assignmentRule, type Envelope, headRule, seal, unseal } from './envelope.js'
import { Looks } from './looks.js'
import { NewestEntries } from './newest-entries.js'
import { type Announcement, type Key, type Registry, ReplacedError } from './registry.js'
import { highestRendezvous } from './rendezvous.js'

/** Of so many runs the last known head is kept for the time when the registry cannot be reached. */
const MOST_KNOWN_HEADS = 10_000
/**
 * A head that others appoint at the same time is read again; in a race this often, somebody's clock or list is broken.
 */
const MOST_APPOINTMENTS = 5

export type LeasedOptions = {
  /** The url of this process, for the others. */
  readonly url: string
  readonly lease_seconds: number
  /** What this process tells of itself with each renewal. */
  report(): PeerReport
}

/** Processes that find each other by leases of a registry: etcd, or the API of Kubernetes. */
export class LeasedCoordinator implements Coordinator {
  readonly changes = new EventEmitter<CoordinatorEvents>()
  readonly #registry: Registry
  readonly #options: LeasedOptions
  readonly #incarnation = randomUUID()
  readonly #looks: Looks
  readonly #heads = new NewestEntries<string>(MOST_KNOWN_HEADS)
  #peers: readonly Peer[] = []
  #problem: string | undefined
  /** Until then nobody is dead, as `performance.now` counts. */
  #grace_until = 0

  constructor(registry: Registry, options: LeasedOptions) {
    this.#registry = registry
    this.#options = options
    this.#looks = new Looks(options.lease_seconds, () => this.#look())
  }

  async start(): Promise<void> {
    try {
      this.#see(await this.#registry.renew(this.#own()))
    } catch (error) {
      throw new ConfigError(`${this.#registry.name} cannot be reached: ${errorText(error)}`)
    }
    this.#looks.start()
  }

  async stop(): Promise<void> {
    await this.#looks.stop()
    // Without an answer the lease ends by itself.
    await this.#registry.leave().catch(() => undefined)
  }

  peers(): readonly Peer[] {
    return this.#peers
  }

  problem(): string | undefined {
    return this.#problem
  }

  async readAssignment(run: string): Promise<Versioned<Assignment> | undefined> {
    const read = await this.#read({ kind: 'assignment', run }, assignmentRule)
    return read && { value: read.value.value, version: read.version }
  }

  writeAssignment(run: string, assignment: Assignment, version: string | undefined): Promise<boolean> {
    return this.#write({ kind: 'assignment', run }, { value: assignment, rule: assignmentRule }, version)
  }

  async removeAssignment(run: string, version: string): Promise<boolean> {
    return this.#asked(() => this.#registry.remove({ kind: 'assignment', run }, version))
  }

  async headOf(run: string): Promise<string> {
    try {
      const head = await this.#appointed(run)
      this.#heads.set(run, head)
      return head
    } catch (error) {
      const known = this.#heads.get(run)
      if (known === undefined) throw error
      return known
    }
  }

  /**
   * Whoever finds a run without a living head appoints that of the highest hash: heads are shared out, and nobody
   * waits.
   */
  async #appointed(run: string): Promise<string> {
    const key: Key = { kind: 'head', run }
    for (let attempt = 0; attempt < MOST_APPOINTMENTS; attempt++) {
      const read = await this.#read(key, headRule)
      const alive = this.#peers.map(({ url }) => url)
      if (read && alive.includes(read.value.value)) return read.value.value
      const head = highestRendezvous(run, alive)
      if (await this.#write(key, { value: head, rule: headRule }, read?.version)) return head
    }
    /* c8 ignore next 4 -- needs a change by others between each of five readings and writings */
    throw new ServiceError(
      'COORDINATOR_FAILED',
      `the head of run '${run}' was changed ${MOST_APPOINTMENTS} times at once`,
    )
  }

  #own(): Announcement {
    const { url, report } = this.#options
    return { ...report(), url, incarnation: this.#incarnation }
  }

  async #look(): Promise<void> {
    const announcements = await this.#renewed()
    if (announcements) {
      if (this.#problem !== undefined) this.#grace_until = performance.now() + this.#options.lease_seconds * 1000
      this.#see(announcements)
      this.#say(undefined)
    }
    this.changes.emit('look')
  }

  async #renewed(): Promise<readonly Announcement[] | undefined> {
    try {
      return await this.#registry.renew(this.#own())
    } catch (error) {
      this.#say(this.#problemOf(error))
      if (error instanceof ReplacedError) this.#looks.end()
      return undefined
    }
  }

  #problemOf(error: unknown): string {
    const { url } = this.#options
    if (error instanceof ReplacedError) return `another process has announced itself as ${url}, later than this one`
    return `${this.#registry.name} cannot be reached, the peers are those of the last look: ${errorText(error)}`
  }

  /**
   * After a time in which nobody could be asked, those who have not renewed yet may be about to: for the length of a
   * lease all stay who were there before.
   */
  #see(announcements: readonly Announcement[]): void {
    const renewed_at = Date.now() / 1000
    const found = announcements.map(({ url, free_bytes, device }) => ({ url, free_bytes, device, renewed_at }))
    const isMissing = ({ url }: Peer) => found.every((each) => each.url !== url)
    const spared = performance.now() < this.#grace_until ? this.#peers.filter(isMissing) : []
    const before = this.#peers
    this.#peers = [...found, ...spared].sort((one, other) => (one.url < other.url ? -1 : 1))
    if (urlsOf(this.#peers) !== urlsOf(before)) this.changes.emit('peers')
  }

  #say(problem: string | undefined): void {
    if (problem === this.#problem) return
    this.#problem = problem
    this.changes.emit('problem')
  }

  async #read<T>(key: Key, rule: Rule<T>): Promise<Versioned<Envelope<T>> | undefined> {
    const read = await this.#asked(() => this.#registry.read(key))
    const where = `${this.#registry.name}: ${key.kind} of run '${key.run}'`
    return read && { value: unseal(read.value, rule, where), version: read.version }
  }

  /**
   * An answer may be lost where the write was not, and a write that is sent again then finds a newer version, its own:
   * so a write that has not succeeded is read, and its mark decides.
   */
  async #write<T>(
    key: Key,
    { value, rule }: { value: T; rule: Rule<T> },
    version: string | undefined,
  ): Promise<boolean> {
    const { mark, content } = seal(value)
    this.#checkSize(key, content)
    const failure = await this.#registry.write(key, content, version).then(
      (written) => (written ? undefined : 'another version is there'),
      (error: unknown) => errorText(error),
    )
    if (failure === undefined) return true
    const read = await this.#read(key, rule)
    if (read?.value.mark === mark) return true
    if (read?.version !== version) return false
    throw new ServiceError(
      'COORDINATOR_FAILED',
      `whether ${key.kind} of run '${key.run}' is written is not known: ${failure}`,
    )
  }

  #checkSize({ kind, run }: Key, content: string): void {
    const bytes = Buffer.byteLength(content)
    if (bytes <= this.#registry.mostBytes) return
    throw new ServiceError(
      'OVER_CAPACITY',
      `the ${kind} of run '${run}' has ${bytes} bytes, ${this.#registry.name} takes at most ${this.#registry.mostBytes}: use fewer parameters`,
    )
  }

  async #asked<T>(ask: () => Promise<T>): Promise<T> {
    try {
      return await ask()
    } catch (error) {
      throw new ServiceError('COORDINATOR_FAILED', `${this.#registry.name} cannot be asked: ${errorText(error)}`)
    }
  }
}

function urlsOf(peers: readonly Peer[]): string {
  return peers.map(({ url }) => url).join(' ')
}
