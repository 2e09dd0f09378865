import { ServiceError } from '../../errors.js'
import { PARAMETERS_PER_YIELD, type Parameter } from '../../optimizer/parameter.js'
import type { OpenFrame, ParameterDeclaration, Quorum } from '../../wire/frame.js'
import { Ranges, rangesProblem } from '../../wire/ranges.js'
import type { Position, Seat } from './member.js'

/** Ranges of one `open`: a column shard has one for each row. */
export const MAX_RANGES = 65_536
/** Members of a run. */
export const MAX_MEMBERS = 1024
/** A day: timers reach little further than 24 of them. */
const MOST_SECONDS = 86_400

/**
 * The seat that an `open` asks for in a run with these parameters; undefined for a run's only member. Throws
 * PARAMETER_INVALID with both values, and OVER_CAPACITY for more ranges than an `open` may have. Yields from time to
 * time.
 */
export function* seatOf(
  { member, quorum, weights, parameters: given }: OpenFrame,
  parameters: readonly Parameter[],
): Generator<undefined, Seat | undefined> {
  if (quorum) checkQuorum(quorum, member)
  if (weights !== undefined && !member) throw invalid('weights is of a member of a run: give member as well')
  if (!member) return refuseRanges(given)
  checkPosition(member)
  const { rank } = member
  const seat = { ...member, ...(quorum && { quorum }), ...(weights && { weights }) }
  if (!given) return seat
  checkCount(given)
  const ranges: Ranges[] = []
  for (const [index, parameter] of parameters.entries()) {
    /* c8 ignore next -- a member with ranges of thousands of parameters */
    if (index % PARAMETERS_PER_YIELD === PARAMETERS_PER_YIELD - 1) yield
    ranges.push(rangesOf(given[index], parameter, rank))
  }
  return { ...seat, ranges }
}

function checkPosition({ rank, world_size, replica = 0, replicas = 1 }: Position): void {
  for (const [name, count] of Object.entries({ world_size, replicas }))
    if (count < 1 || count > MAX_MEMBERS) throw invalid(`member.${name} is ${count}, expected 1 to ${MAX_MEMBERS}`)
  if (world_size * replicas > MAX_MEMBERS) {
    const members = `member.world_size ${world_size} times member.replicas ${replicas} is ${world_size * replicas} members`
    throw invalid(`${members}, expected at most ${MAX_MEMBERS}`)
  }
  if (rank >= world_size) throw invalid(`member.rank is ${rank}, expected less than world_size, ${world_size}`)
  if (replica >= replicas) throw invalid(`member.replica is ${replica}, expected less than replicas, ${replicas}`)
}

function checkQuorum({ min_replicas, deadline_seconds }: Quorum, member: Position | undefined): void {
  if (!member) throw invalid('quorum is of a run with replicas: give member as well')
  const { replicas = 1 } = member
  if (min_replicas < 1 || min_replicas > replicas)
    throw invalid(`quorum.min_replicas is ${min_replicas}, expected 1 to member.replicas, ${replicas}`)
  if (!(deadline_seconds > 0 && deadline_seconds <= MOST_SECONDS))
    throw invalid(`quorum.deadline_seconds is ${deadline_seconds}, expected more than 0 and at most ${MOST_SECONDS}`)
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
