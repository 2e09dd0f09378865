import { ServiceError } from '../errors.js'
import type { Quotas } from './quotas.js'
import { Rate } from './rate.js'

/**
 * What a key may do; no scope has another one in it.
 * - step: open the stream, create runs, send gradients
 * - read: runs, parameters, state, receipts, events, checkpoints, and with all runs the metrics
 * - checkpoint: take and delete checkpoints, go back to one, begin a run at one, import state
 * - admin: delete runs
 */
export const SCOPES = ['step', 'read', 'checkpoint', 'admin'] as const
export type Scope = (typeof SCOPES)[number]

/** What the key of the cluster may do beside that, and no other key: no file of keys can give it. */
export const CLUSTER = 'cluster'
export type Power = Scope | typeof CLUSTER

/** What a principal may do, and with which runs; without `runs` with all of them. */
export type Grants = {
  readonly name: string
  readonly scopes: readonly Power[]
  readonly runs?: string | undefined
  readonly quotas?: Quotas | undefined
}

/** Whoever sends requests with one key. It stays the same while its grants change, and until the key is removed. */
export class Principal {
  #grants: Grants | undefined
  readonly #name: string
  readonly #uses = new Set<() => void>()
  #connections = 0
  /** Of the bytes of gradients that it sends, and of state that it reads or imports. */
  readonly rate = new Rate(() => this.quotas.bytes_per_second)

  constructor(grants: Grants) {
    this.#grants = grants
    this.#name = grants.name
  }

  /** The key's name, which is no secret. */
  get name(): string {
    return this.#name
  }

  /** The most that it may have of each thing. */
  get quotas(): Quotas {
    return this.#grants?.quotas ?? {}
  }

  /** Its streams and event streams. */
  get connections(): number {
    return this.#connections
  }

  /** Counts a connection, until the function is called that this returns. */
  connect(): () => void {
    this.#connections += 1
    return () => {
      this.#connections -= 1
    }
  }

  /** Throws OVERLOADED where it may have no more connections. */
  checkConnections(): void {
    const { connections: most = Number.POSITIVE_INFINITY } = this.quotas
    if (this.#connections < most) return
    const remedy = 'close one, or raise quotas.connections of the key'
    const message = `the key '${this.#name}' has ${this.#connections} connections, its quota is ${most}: ${remedy}`
    throw new ServiceError('OVERLOADED', message, { retry_after_seconds: 1 })
  }

  /** Whether a run of this name is its, if there is one: for anybody else there is none. */
  sees(run: string): boolean {
    return this.#grants !== undefined && run.startsWith(this.#grants.runs ?? '')
  }

  /**
   * Throws FORBIDDEN where it may not do `what`, which takes a scope, and UNAUTHORIZED where its key was removed.
   */
  demand(scope: Power, what: string): void {
    const { scopes } = this.#held
    if (scopes.includes(scope)) return
    const has = scopes.length === 0 ? 'none' : scopes.join(', ')
    throw new ServiceError('FORBIDDEN', `${what} takes a key with the scope ${scope}; this one has ${has}`)
  }

  /** Throws FORBIDDEN where it may not do `what`, which is about the runs of everybody. */
  demandAllRuns(what: string): void {
    const { runs } = this.#held
    if (runs === undefined) return
    throw new ServiceError('FORBIDDEN', `${what} takes a key for all runs; this one is for those named ${runs}…`)
  }

  /** Throws FORBIDDEN where a run of this name would not be its. */
  demandName(run: string): void {
    if (this.sees(run)) return
    const { runs } = this.#held
    throw new ServiceError('FORBIDDEN', `this key is for runs named ${runs}…, not '${run}'`)
  }

  /** Has `recheck` called each time its grants have changed, until the function is called that this returns. */
  use(recheck: () => void): () => void {
    // Another one each time, so that the same function may be given twice.
    const use = () => recheck()
    this.#uses.add(use)
    return () => void this.#uses.delete(use)
  }

  /** Gives it other grants, or with undefined none: its key was removed. */
  change(grants: Grants | undefined): void {
    this.#grants = grants
    for (const recheck of [...this.#uses]) recheck()
  }

  get #held(): Grants {
    if (this.#grants !== undefined) return this.#grants
    throw new ServiceError('UNAUTHORIZED', `the key '${this.#name}' was removed`)
  }
}
