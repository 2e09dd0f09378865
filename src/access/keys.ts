import { timingSafeEqual } from 'node:crypto'
import { type Config, ConfigError } from '../config.js'
import { type ClusterKeySettings, readClusterKey } from './cluster-key.js'
import { hashOf, type KeyRecord, readKeyFile } from './key-file.js'
import { CLUSTER, Principal, SCOPES } from './principal.js'

type KeySettings = Pick<Config, 'api_keys' | 'keys_file'> & ClusterKeySettings
type Known = { readonly hash: Buffer; readonly principal: Principal }

/** Who may use the service: the keys of the settings and of their file. Without any, everybody may do everything. */
export class Keys {
  /** Who comes without a key: undefined where one is needed. */
  readonly everybody: Principal | undefined
  readonly #settings: KeySettings
  #known: ReadonlyMap<string, Known> = new Map()
  /** The other processes of the cluster; undefined where there are none. */
  readonly #cluster: Known | undefined

  /** Throws ConfigError as `readKeyFile`, and where a file has no key. */
  constructor(settings: KeySettings) {
    this.#settings = settings
    this.#cluster = clusterOf(readClusterKey(settings))
    const isOpen = settings.api_keys.length === 0 && settings.keys_file === ''
    this.everybody = isOpen ? new Principal({ name: 'everybody', scopes: SCOPES }) : undefined
    if (this.reload().keys === 0 && !isOpen)
      throw new ConfigError(`key file '${settings.keys_file}' has no key: nobody could use the service`)
  }

  /**
   * Whose key this is. It is compared with every key, each in a time that does not depend on how much of it is right.
   */
  find(key: string): Principal | undefined {
    const candidate = Buffer.from(hashOf(key), 'hex')
    let found: Principal | undefined
    const all = this.#cluster ? [...this.#known.values(), this.#cluster] : this.#known.values()
    for (const { hash, principal } of all) if (timingSafeEqual(hash, candidate)) found = principal
    return found
  }

  /**
   * Reads the file again, and has the connections of keys whose grants are others now, or that are gone, look at
   * themselves. A file without a key lets nobody in. Throws as `readKeyFile`, and then all keys are what they were.
   */
  reload(): { keys: number } {
    const before = this.#known
    const records = recordsOf(this.#settings)
    const entry = (record: KeyRecord): [string, Known] => {
      const known = before.get(record.sha256)
      return [record.sha256, known ?? { hash: Buffer.from(record.sha256, 'hex'), principal: new Principal(record) }]
    }
    this.#known = new Map(records.map(entry))
    for (const record of records) before.get(record.sha256)?.principal.change(record)
    for (const [sha256, { principal }] of before) if (!this.#known.has(sha256)) principal.change(undefined)
    return { keys: records.length }
  }
}

/** Its key may do what one process asks of another: vote, and read, keep and delete shards. */
function clusterOf(key: string): Known | undefined {
  if (key === '') return undefined
  const principal = new Principal({ name: CLUSTER, scopes: [CLUSTER, 'read', 'checkpoint', 'admin'] })
  return { hash: Buffer.from(hashOf(key), 'hex'), principal }
}

function recordsOf({ api_keys, keys_file }: KeySettings): KeyRecord[] {
  const given = api_keys.map((key, index) => ({ name: `api_keys[${index}]`, sha256: hashOf(key), scopes: SCOPES }))
  return [...given, ...(keys_file === '' ? [] : readKeyFile(keys_file))]
}
