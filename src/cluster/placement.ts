import { newtonSchulzFlops } from '../../kernels/flops.js'
import { ServiceError } from '../errors.js'
import { type Attention, claimsOf } from '../optimizer/attention.js'
import { type Parameter, stateBytes } from '../optimizer/parameter.js'

/** Newton–Schulz as Muon has it unless told otherwise: five iterations of a quintic, none of its factors 0. */
const ITERATIONS = Array.from({ length: 5 }, () => [1, 1, 1] as const)

/**
 * So many operations of Newton–Schulz take as long as one byte that is moved. Two cores do about 50 GFLOP/s and move
 * 0.5 GB/s over a socket, an H200 does about 300 TFLOP/s and moves some TB/s (docs/measurements.md): 100 either way.
 */
const FLOPS_PER_BYTE = 100

/** What a parameter takes however small it is, in bytes: its frames, its job and its records, some 50 µs. */
const BYTES_PER_PARAMETER = 2 ** 15

/**
 * What a parameter costs in a step, in operations: those of Newton–Schulz, and FLOPS_PER_BYTE for each byte of gradient
 * and update, which travel, and of state, which is read and written. It does not depend on the values of
 * hyperparameters, since those may change with any step, and a parameter stays in its shard.
 */
export function parameterCost(parameter: Parameter): number {
  const { gradient_bytes, update_bytes, blocks } = parameter
  const flops = blocks.reduce((sum, { rows, cols }) => sum + newtonSchulzFlops(ITERATIONS, [rows, cols]), 0)
  const bytes = gradient_bytes + update_bytes + 2 * stateBytes(parameter) + BYTES_PER_PARAMETER
  return flops + FLOPS_PER_BYTE * bytes
}

/** So many shards the parameters of a run can be shared out over. */
export function mostShards(parameters: readonly Parameter[], attentions: readonly Attention[]): number {
  return together(parameters, attentions).length
}

/**
 * Shares the parameters of a run out over shards: the largest first, each to the shard that has the least cost. The
 * parameters of one attention stay together, since QK-clip scales them by the same logits. A parameter is not cut: one
 * of many matrices, such as a stack of experts, lies in one shard whole. Equal arguments give equal answers.
 *
 * Answers with the indices of each shard, ascending. Throws PARAMETER_INVALID where there are more shards than
 * parameters, those of an attention counting as one: a run without parameters cannot be opened.
 */
export function placeShards(
  parameters: readonly Parameter[],
  attentions: readonly Attention[],
  shards: number,
): readonly (readonly number[])[] {
  const pieces = together(parameters, attentions).map((indices) => {
    return { indices, cost: indices.reduce((sum, index) => sum + parameterCost(parameters[index]), 0) }
  })
  if (pieces.length < shards) throw tooMany(shards, pieces.length)
  const placed = Array.from({ length: shards }, () => ({ cost: 0, indices: [] as number[] }))
  // Sorting is stable: pieces of one cost are taken in the order of their first parameters.
  for (const { indices, cost } of pieces.sort((one, other) => other.cost - one.cost)) {
    const least = placed.reduce((best, shard) => (shard.cost < best.cost ? shard : best))
    least.cost += cost
    least.indices.push(...indices)
  }
  return placed.map(({ indices }) => indices.sort((one, other) => one - other))
}

function tooMany(shards: number, pieces: number): ServiceError {
  const message = `the run cannot be cut into ${shards} shards: it has ${pieces} parameters, those of an attention counted as one`
  return new ServiceError('PARAMETER_INVALID', `${message}. Ask for at most ${pieces} shards`)
}

/** The indices that have to stay together, those of an attention or of several that share one; others are alone. */
function together(parameters: readonly Parameter[], attentions: readonly Attention[]): number[][] {
  const groups = parameters.map(({ index }) => [index])
  for (const attention of attentions) {
    const all = new Set(claimsOf(attention).flatMap(({ parameter }) => groups[parameter]))
    const joined = [...all].sort((one, other) => one - other)
    for (const index of joined) groups[index] = joined
  }
  return [...new Set(groups)]
}
