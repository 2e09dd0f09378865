import { readAnnouncement } from '../announcement.js'
import type { Versioned } from '../coordinator.js'
import { type Announcement, announced, type Key, type Registry, ReplacedError } from '../registry.js'
import type { EtcdClient } from './client.js'

/** etcd refuses a request of more than 1.5 MiB (`--max-request-bytes`), keys and all. */
const MOST_BYTES = 1_400_000

/** `lease` is left out where a key has none. */
type KeyValue = { readonly key: string; readonly value: string; readonly mod_revision: string; readonly lease?: string }
/** A process that has announced itself, and its key. */
type Found = {
  readonly announcement: Announcement
  readonly content: string
  readonly version: string
  readonly lease: string | undefined
}

/**
 * Leases and values in etcd. The keys of a cluster are below its prefix: `peers/URL`, which go with the lease of their
 * process, and `assignment/RUN` and `head/RUN`, which stay. The version of a value is etcd's `mod_revision`, and a
 * write is a transaction that compares it.
 */
export class EtcdRegistry implements Registry {
  readonly name: string
  readonly mostBytes = MOST_BYTES
  readonly #client: EtcdClient
  readonly #prefix: string
  readonly #lease_seconds: number
  #lease: string | undefined
  /** Announced once, a process does not take its place back from another one. */
  #isAnnounced = false

  constructor(client: EtcdClient, options: { name: string; prefix: string; lease_seconds: number }) {
    this.name = options.name
    this.#client = client
    this.#prefix = options.prefix
    this.#lease_seconds = options.lease_seconds
  }

  async renew(own: Announcement): Promise<readonly Announcement[]> {
    if (this.#lease !== undefined && !(await this.#keepAlive(this.#lease))) this.#lease = undefined
    const lease = this.#lease ?? (await this.#grant())
    this.#lease = lease
    const others = await announced(own, () => this.#announce(own, lease))
    return [...others, own]
  }

  async leave(): Promise<void> {
    if (this.#lease !== undefined) await this.#client.call('/v3/lease/revoke', { ID: this.#lease })
  }

  async read(key: Key): Promise<Versioned<string> | undefined> {
    const [found] = await this.#range({ key: encoded(this.#keyOf(key)) })
    return found && { value: decoded(found.value), version: found.mod_revision }
  }

  write(key: Key, content: string, version: string | undefined): Promise<boolean> {
    return this.#put({ key: this.#keyOf(key), content }, version)
  }

  remove(key: Key, version: string): Promise<boolean> {
    const name = this.#keyOf(key)
    return this.#transact(name, version, { request_delete_range: { key: encoded(name) } })
  }

  #keyOf({ kind, run }: Key): string {
    return `${this.#prefix}/${kind}/${run}`
  }

  async #grant(): Promise<string> {
    const { ID } = await this.#client.call('/v3/lease/grant', { TTL: this.#lease_seconds })
    return String(ID)
  }

  /** Whether the lease had not ended. */
  async #keepAlive(lease: string): Promise<boolean> {
    const { result } = await this.#client.call('/v3/lease/keepalive', { ID: lease })
    return Number((result as { TTL?: string } | undefined)?.TTL ?? 0) > 0
  }

  /**
   * Answers all others; undefined where its own key was written by another process meanwhile. It writes only what has
   * changed: every write stays in etcd until it is compacted.
   */
  async #announce(own: Announcement, lease: string): Promise<readonly Announcement[] | undefined> {
    const found = await this.#announcements()
    const mine = found.find(({ announcement }) => announcement.url === own.url)
    const isOthers = mine !== undefined && mine.announcement.incarnation !== own.incarnation
    if (isOthers && this.#isAnnounced) throw new ReplacedError()
    const content = JSON.stringify(own)
    const isSame = mine?.lease === lease && mine.content === content
    const key = `${this.#prefix}/peers/${own.url}`
    /* c8 ignore next -- another process comes between a reading and a writing */
    if (!isSame && !(await this.#put({ key, content, lease }, mine?.version))) return undefined
    this.#isAnnounced = true
    return found.filter((each) => each !== mine).map(({ announcement }) => announcement)
  }

  async #announcements(): Promise<Found[]> {
    const from = `${this.#prefix}/peers/`
    // '0' is the character behind '/': the range has all keys that begin with `from`.
    const found = await this.#range({ key: encoded(from), range_end: encoded(`${this.#prefix}/peers0`) })
    return found.map(({ key, value, mod_revision, lease }) => {
      const content = decoded(value)
      return {
        announcement: readAnnouncement(content, `${this.name}: ${decoded(key)}`),
        content,
        version: mod_revision,
        lease,
      }
    })
  }

  async #range(range: { key: string; range_end?: string }): Promise<readonly KeyValue[]> {
    const { kvs } = await this.#client.call('/v3/kv/range', range)
    return (kvs ?? []) as readonly KeyValue[]
  }

  #put(
    { key, content, lease }: { key: string; content: string; lease?: string },
    version: string | undefined,
  ): Promise<boolean> {
    const put = { key: encoded(key), value: encoded(content), ...(lease !== undefined && { lease }) }
    return this.#transact(key, version, { request_put: put })
  }

  /** Does it if the key is still of the version; the revision of a key that is not there is 0. */
  async #transact(key: string, version: string | undefined, operation: object): Promise<boolean> {
    const compare = [{ key: encoded(key), target: 'MOD', result: 'EQUAL', mod_revision: version ?? '0' }]
    const { succeeded } = await this.#client.call('/v3/kv/txn', { compare, success: [operation] })
    return succeeded === true
  }
}

function encoded(text: string): string {
  return Buffer.from(text).toString('base64')
}

function decoded(base64: string): string {
  return Buffer.from(base64, 'base64').toString()
}
