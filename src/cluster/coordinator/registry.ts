import type { PeerReport, Versioned } from './coordinator.js'

/** What is kept of a run: its assignment, and the url of its head. */
export type Key = { readonly kind: 'assignment' | 'head'; readonly run: string }

/** A process as it announces itself; `incarnation` is new with each start, which tells two of one url apart. */
export type Announcement = PeerReport & { readonly url: string; readonly incarnation: string }

/** Another process has announced itself under the url of this one, later than this one did. */
export class ReplacedError extends Error {
  override readonly name = 'ReplacedError'
}

/**
 * A system that keeps leases and small values with conditional writes. Every method throws where it cannot be reached,
 * in bounded time; a `write` or `remove` that throws may have happened.
 */
export interface Registry {
  /** As messages name it, such as etcd://10.0.0.1:2379/muond. */
  readonly name: string
  /** Most bytes of a value. */
  readonly mostBytes: number
  /**
   * Announces a process, in place of another of the same url, and from the second call on renews its lease; answers all
   * whose lease has not ended. Throws ReplacedError once another process has taken its place.
   */
  renew(own: Announcement): Promise<readonly Announcement[]>
  /** Ends the lease. */
  leave(): Promise<void>
  read(key: Key): Promise<Versioned<string> | undefined>
  /** Writes if the version is still the given one; undefined: if there is no value. */
  write(key: Key, content: string, version: string | undefined): Promise<boolean>
  remove(key: Key, version: string): Promise<boolean>
}

/** Of two processes that announce themselves by one url at a time, the later one looks again. */
const MOST_ATTEMPTS = 3

/** Tries until a process has announced itself, which is undefined where another one came between. */
export async function announced<T>(own: Announcement, announce: () => Promise<T | undefined>): Promise<T> {
  for (let attempt = 0; attempt < MOST_ATTEMPTS; attempt++) {
    const others = await announce()
    /* c8 ignore next -- the other one comes between a reading and a writing */
    if (others !== undefined) return others
  }
  /* c8 ignore next 2 -- and that three times */
  throw new Error(`others announce themselves as ${own.url} again and again`)
}
