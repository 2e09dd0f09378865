import { readClusterKey } from '../access/cluster-key.js'
import type { Config } from '../config.js'
import { ServiceError } from '../errors.js'
import type { Log } from '../keep/keeper.js'
import type { Runs } from '../keep/runs.js'
import type { Metrics } from '../metrics.js'
import type { Presets } from '../optimizer/preset.js'
import type { MovedFrame, OpenFrame } from '../wire/frame.js'
import { parseShardName, streamOf } from './names.js'
import { Calls } from './peers/calls.js'
import { Peers } from './peers/peers.js'
import { type Pass, Shards } from './shard/shards.js'

export type { Pass } from './shard/shards.js'

import { openWholes } from './head/open-wholes.js'
import { type OpenedWhole, unfollowed, Wholes } from './head/wholes.js'

export type ClusterMeans = { config: Config; presets: Presets; runs: Runs; metrics: Metrics; log: Log }

/**
 * What becomes of an `open`: it is answered with `moved`, or opens a whole, or a run of this process: then `pass`,
 * where that is a shard, has the last word.
 */
export type Way =
  | { readonly kind: 'moved'; readonly frame: MovedFrame }
  | { readonly kind: 'whole'; readonly opened: OpenedWhole }
  | { readonly kind: 'run'; readonly pass?: Pass }

/** This process as one of several that runs are spread over. */
export class Cluster {
  readonly wholes: Wholes
  readonly #shards: Shards
  readonly #peers: Peers
  readonly #hasRun: (name: string) => boolean

  /**
   * Undefined without the setting `peers`. Throws ConfigError where the key of the cluster or a whole in the data
   * folder cannot be used.
   */
  static async start({ config, presets, runs, metrics, log }: ClusterMeans): Promise<Cluster | undefined> {
    const { peers: urls, advertise, shards, max_runs: most } = config
    if (urls.length === 0) return undefined
    const peers = new Peers(urls, advertise)
    const calls = new Calls(readClusterKey(config))
    const files = await openWholes(config, metrics)
    const hasRun = (name: string) => runs.has(name)
    const wholes = new Wholes({ peers, calls, presets, shards, most, files, hasRun })
    await wholes.restore()
    return new Cluster({ peers, wholes, hasRun }, new Shards({ peers, calls, wholes, log, hasRun }))
  }

  private constructor(
    { peers, wholes, hasRun }: { peers: Peers; wholes: Wholes; hasRun: (name: string) => boolean },
    shards: Shards,
  ) {
    this.#peers = peers
    this.wholes = wholes
    this.#shards = shards
    this.#hasRun = hasRun
  }

  /** Throws what an `open` of a whole or a shard is refused with. */
  async wayOf(frame: OpenFrame): Promise<Way> {
    if (frame.shard !== undefined || parseShardName(frame.run))
      return { kind: 'run', pass: await this.#shards.enter(frame) }
    const head = this.#peers.headOf(frame.run)
    // A run that was made before there were peers stays where it is.
    if (head !== this.#peers.self && this.#hasRun(frame.run)) return { kind: 'run' }
    if (head !== this.#peers.self) {
      const url = streamOf(head)
      if (frame.shards === undefined) throw unfollowed(frame, `is opened at ${url}`)
      return { kind: 'moved', frame: { type: 'moved', run: frame.run, url } }
    }
    const opened = await this.wholes.open(frame)
    return opened ? { kind: 'whole', opened } : { kind: 'run' }
  }

  /** Throws PARAMETER_INVALID for a run that plain requests cannot train here: that of another process, and a whole. */
  checkPlain(frame: OpenFrame): void {
    const head = this.#peers.headOf(frame.run)
    const remedy = 'plain requests know no run over several processes'
    if (head !== this.#peers.self)
      throw new ServiceError('PARAMETER_INVALID', `run '${frame.run}' is opened at ${head}: ${remedy}`)
    if (this.wholes.has(frame.run))
      throw new ServiceError('PARAMETER_INVALID', `run '${frame.run}' has several shards: ${remedy}`)
  }

  async close(): Promise<void> {
    this.#shards.close()
    await this.wholes.close()
  }
}
