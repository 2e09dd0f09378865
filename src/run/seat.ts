import { ServiceError } from '../errors.js'
import { PARAMETERS_PER_YIELD, type Parameter } from '../optimizer/parameter.js'
import type { OpenFrame, ParameterDeclaration } from '../wire/frame.js'
import { Ranges, rangesProblem } from '../wire/ranges.js'
import type { Seat } from './step/member.js'

/** Ranges of one `open`: a column shard has one for each row. */
export const MAX_RANGES = 65_536
/** Members of a run. */
export const MAX_MEMBERS = 1024

/**
 * The seat that an `open` asks for in a run with these parameters; undefined for a run's only member. Throws
 * PARAMETER_INVALID with both values, and OVER_CAPACITY for more ranges than an `open` may have. Yields from time to
 * time.
 */
export function* seatOf(
  { member, parameters: given }: OpenFrame,
  parameters: readonly Parameter[],
): Generator<undefined, Seat | undefined> {
  if (!member) return refuseRanges(given)
  const { rank, world_size } = member
  if (world_size < 1 || world_size > MAX_MEMBERS)
    throw invalid(`member.world_size is ${world_size}, expected 1 to ${MAX_MEMBERS}`)
  if (rank >= world_size) throw invalid(`member.rank is ${rank}, expected less than world_size, ${world_size}`)
  if (!given) return { rank, world_size }
  checkCount(given)
  const ranges: Ranges[] = []
  for (const [index, parameter] of parameters.entries()) {
    /* c8 ignore next -- a member with ranges of thousands of parameters */
    if (index % PARAMETERS_PER_YIELD === PARAMETERS_PER_YIELD - 1) yield
    ranges.push(rangesOf(given[index], parameter, rank))
  }
  return { rank, world_size, ranges }
}

function rangesOf({ ranges }: ParameterDeclaration, parameter: Parameter, rank: number): Ranges {
  const { index, name, elements } = parameter
  if (!ranges) return Ranges.whole(elements)
  const problem = rangesProblem(ranges, parameter)
  if (problem) throw invalid(`parameter '${name}' of rank ${rank}: ${problem}`, index)
  return new Ranges(ranges.map(([start, stop]) => [start, stop]))
}

function refuseRanges(given: OpenFrame['parameters']): undefined {
  const one = given?.findIndex(({ ranges }) => ranges) ?? -1
  if (!given || one < 0) return undefined
  throw invalid(`parameter '${given[one].name}' has ranges, which only a member of a run has: give member as well`, one)
}

function checkCount(given: readonly ParameterDeclaration[]): void {
  const count = given.reduce((sum, { ranges = [] }) => sum + ranges.length, 0)
  if (count <= MAX_RANGES) return
  throw new ServiceError('OVER_CAPACITY', `an open holds at most ${MAX_RANGES} ranges, given are ${count}`)
}

function invalid(message: string, parameter?: number): ServiceError {
  return new ServiceError('PARAMETER_INVALID', message, parameter === undefined ? {} : { parameter })
}
