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
