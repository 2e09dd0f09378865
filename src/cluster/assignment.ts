import { ServiceError } from '../errors.js'
import type { Attention } from '../optimizer/attention.js'
import { allStateBytes, type Parameter } from '../optimizer/parameter.js'
import { mostShards, placeShards } from './placement.js'

/** One shard of a whole: the address of the process that has it, and the indices of its parameters, ascending. */
export type AssignedShard = { readonly peer: string; readonly parameters: readonly number[] }

/**
 * Which shard of a run has which parameters, and which process has which shard. The parameters of a shard are the same
 * for the life of the run; its process may change, and then `generation` grows. Generations are the fencing token:
 * whoever writes an assignment compares and swaps it, so that no two heads have the same generation.
 */
export type Assignment = {
  readonly run: string
  readonly generation: number
  readonly shards: readonly AssignedShard[]
}

/** A process that shards can be given to, and the bytes of state that it has room for. */
export type Room = { readonly url: string; readonly free_bytes: number }

/** Where there is no room, not even for a shard of no bytes. */
const NOWHERE: readonly [url: string, free_bytes: number] = ['', -1]

/** A shard that needs a process, and the bytes of state that it will have. */
type Homeless = { readonly shard: number; readonly bytes: number }

/**
 * The first assignment of a run. Without a number of shards there are as few as have room for their state. Throws
 * OVER_CAPACITY where there is no room, and as `placeShards`.
 */
export function firstAssignment(
  run: string,
  { parameters, attentions }: { parameters: readonly Parameter[]; attentions: readonly Attention[] },
  { rooms, shards }: { rooms: readonly Room[]; shards?: number },
): Assignment {
  const bytes = allStateBytes(parameters)
  const most = Math.min(rooms.length, mostShards(parameters, attentions))
  const counts = shards === undefined ? fewest(bytes, rooms, most) : [shards]
  let refusal = noRoom(run, { shard: 0, bytes }, rooms)
  for (const count of counts) {
    const placed = placeShards(parameters, attentions, count)
    const homeless = placed.map((indices, shard) => ({ shard, bytes: bytesOf(parameters, indices) }))
    const peers = peersFor(homeless, rooms)
    if (Array.isArray(peers))
      return { run, generation: 1, shards: placed.map((indices, i) => ({ peer: peers[i], parameters: indices })) }
    refusal = noRoom(run, peers, rooms)
  }
  throw refusal
}

/**
 * The assignment after it, of the next generation: a shard whose process is among `rooms` stays there, the others go to
 * processes that have room for their state. Throws OVER_CAPACITY where there is none: the shard waits for its process.
 */
export function nextAssignment(
  before: Assignment,
  rooms: readonly Room[],
  parameters: readonly Parameter[],
): Assignment {
  const alive = new Set(rooms.map(({ url }) => url))
  const homeless = before.shards.flatMap(({ peer, parameters: indices }, shard) => {
    return alive.has(peer) ? [] : [{ shard, bytes: bytesOf(parameters, indices) }]
  })
  const peers = peersFor(homeless, rooms)
  if (!Array.isArray(peers)) throw noRoom(before.run, peers, rooms)
  const shards = before.shards.map((shard, i) => ({ ...shard, peer: peers[i] ?? shard.peer }))
  return { ...before, generation: before.generation + 1, shards }
}

function bytesOf(parameters: readonly Parameter[], indices: readonly number[]): number {
  return allStateBytes(indices.map((index) => parameters[index]))
}

/** The numbers of shards, up to `most`, for which the processes with the most room have so many bytes. */
function fewest(bytes: number, rooms: readonly Room[], most: number): number[] {
  const free = rooms.map(({ free_bytes }) => free_bytes).sort((one, other) => other - one)
  const counts = Array.from({ length: most }, (_, fewer) => fewer + 1)
  return counts.filter((count) => free.slice(0, count).reduce((sum, room) => sum + room, 0) >= bytes)
}

/**
 * A process for each of these shards, by the shard: the largest first, each to where the most room is left, of equal
 * ones the first. Or the shard that no process has room for.
 */
function peersFor(homeless: readonly Homeless[], rooms: readonly Room[]): string[] | Homeless {
  const left = new Map(rooms.map(({ url, free_bytes }) => [url, free_bytes]))
  const peers: string[] = []
  for (const { shard, bytes } of [...homeless].sort((a, b) => b.bytes - a.bytes)) {
    const [most, free] = [...left].reduce<typeof NOWHERE>((best, room) => (room[1] > best[1] ? room : best), NOWHERE)
    if (free < bytes) return { shard, bytes }
    left.set(most, free - bytes)
    peers[shard] = most
  }
  return peers
}

function noRoom(run: string, { shard, bytes }: Homeless, rooms: readonly Room[]): ServiceError {
  const free = rooms.map(({ url, free_bytes }) => `${free_bytes} on ${url}`).join(', ') || 'there is no process'
  const message = `shard ${shard} of run '${run}' needs ${bytes} bytes of state, free are ${free}`
  return new ServiceError('OVER_CAPACITY', `${message}: start another process, or free memory`)
}
