import type { Cluster } from '../../cluster/cluster.js'
import { parseShardName } from '../../cluster/names.js'
import { voteOf } from '../../cluster/peers/vote-text.js'
import { ServiceError } from '../../errors.js'
import type { components } from '../openapi.js'
import type { Handlers, Services } from '../operations.js'

type Schemas = components['schemas']

export type ShardOperation = 'getShards' | 'getVotes' | 'postVote'

/**
 * Most bytes of a vote. Of 100,000 parameters it has 7 MB, and with QK-clip four bytes for each row that is scaled, a
 * third more in base64.
 */
export const VOTE_BYTES = 2 ** 26

/** The handlers of runs that are spread over several processes. */
export function shardHandlers({ cluster }: Pick<Services, 'cluster'>): Pick<Handlers, ShardOperation> {
  const body = (run: string) => {
    if (cluster?.wholes.has(run)) return cluster.wholes.get(run).body()
    throw new ServiceError('NOT_FOUND', `run '${run}' is one of this process alone, and has no shards`)
  }
  return {
    getShards: ({ params }) => body(params.run),
    getVotes: ({ params }) => body(params.run),
    postVote: ({ params, body }, reply) => {
      /* c8 ignore next -- without peers no key may vote, and the schema asks for a body */
      if (!cluster || !body) throw new ServiceError('NOT_FOUND', 'this service has no peers: it counts no votes')
      cluster.wholes.get(params.run).vote(voteOf(body))
      return reply.code(204).send()
    },
  }
}

/** The wholes of which this process is the head, as the list of runs has them. */
export function wholesBody({ wholes }: Cluster): Schemas['WholeSummary'][] {
  return wholes.list().map(({ run: name, generation, step, digest, record, parameters }) => ({
    ...{ name, generation, step, digest, created_at: record.created_at },
    ...{ shards: record.shards.length, parameters: parameters.length },
  }))
}

/** The whole that a run is a shard of. */
export function shardOf(name: string): { shard_of?: string } {
  const shard = parseShardName(name)
  return shard ? { shard_of: shard.whole } : {}
}

/** Throws PARAMETER_INVALID for a shard: what would change it behind the back of its whole. */
export function refuseShard(name: string, what: string): void {
  const shard = parseShardName(name)
  if (shard) throw new ServiceError('PARAMETER_INVALID', `run '${name}' is a shard of run '${shard.whole}': ${what}`)
}
