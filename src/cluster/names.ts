import { createHash } from 'node:crypto'
import { describe, type Parameter } from '../optimizer/parameter.js'

// How a whole and its shards are named, and what two processes have to agree on.

/** A shard as its name has it: `gpt~1` is the one with index 1 of the whole `gpt`. */
export type ShardName = { readonly whole: string; readonly index: number }

export function shardName(whole: string, index: number): string {
  return `${whole}~${index}`
}

/** Undefined for the name of a run that is no shard. */
export function parseShardName(name: string): ShardName | undefined {
  const at = name.lastIndexOf('~')
  return at < 0 ? undefined : { whole: name.slice(0, at), index: Number(name.slice(at + 1)) }
}

/** The stream of a process: `wss://10.0.0.2:8787/v1/stream`. */
export function streamOf(peer: string): string {
  return `${peer.replace(/^http/, 'ws')}/v1/stream`
}

/** Ascending indices as ranges [start, stop). */
export function rangesOf(indices: readonly number[]): [number, number][] {
  const ranges: [number, number][] = []
  for (const index of indices) {
    const last = ranges.at(-1)
    if (last?.[1] === index) last[1] += 1
    else ranges.push([index, index + 1])
  }
  return ranges
}

/**
 * SHA-256 over what parameters are declared as, in their order. Of those of a shard it tells whether a client has cut
 * the run as `placed` says.
 */
export function declaredHash(parameters: readonly Parameter[]): string {
  const hash = createHash('sha256')
  for (const parameter of parameters) {
    // A shard counts its parameters anew.
    const { index: _, ...declared } = describe(parameter)
    hash.update(`${JSON.stringify(declared)}\n`)
  }
  return hash.digest('hex')
}
