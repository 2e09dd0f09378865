import { ServiceError } from '../../errors.js'
import { PARAMETERS_PER_YIELD, type Parameter } from '../../optimizer/parameter.js'
import type { Range, Ranges } from '../../wire/ranges.js'
import { memberId, type Seat } from './member.js'

/** Elements of a parameter that no rank has. */
export type Gap = { readonly parameter: Parameter; readonly range: Range }

type RanksOptions = { replica: number; world_size: number; before: Ranks | undefined }
type Rank = { readonly ranges: readonly Ranges[] | undefined; readonly opened: boolean }

/**
 * The ranks of one replica, and which elements each of them sends and receives. Each rank declares its own with its
 * first `open`, and no two may have the same; ranks that begin anew remember the ranges of those before them, for
 * members that open without parameters.
 */
export class Ranks {
  readonly replica: number
  readonly world_size: number
  readonly #parameters: readonly Parameter[]
  readonly #ranks: Map<number, Rank>
  /** Undefined until it was looked for since a rank was declared; null where there is none. */
  #gap: Gap | null | undefined

  constructor(parameters: readonly Parameter[], { replica, world_size, before }: RanksOptions) {
    this.#parameters = parameters
    this.replica = replica
    this.world_size = world_size
    const kept = before ? before.#ranks : []
    this.#ranks = new Map([...kept].map(([rank, { ranges }]) => [rank, { ranges, opened: false }]))
  }

  /** The ranges of a rank that has opened before. */
  ranges(rank: number): readonly Ranges[] | undefined {
    return this.#ranks.get(rank)?.ranges
  }

  /**
   * Holds the ranges that an `open` gives for a rank against those of the ranks that are there. Throws
   * PARAMETER_INVALID for elements of another rank and for a rank that never gave any, and RUN_MISMATCH for a rank that
   * has others already. Yields from time to time.
   */
  *checking({ rank, ranges }: Seat): Generator<undefined, void> {
    const known = this.#ranks.get(rank)
    if (!ranges) {
      if (known) return
      throw new ServiceError('PARAMETER_INVALID', `rank ${rank} has never opened this run: open needs its parameters`)
    }
    for (const parameter of this.#parameters) {
      const { index, name } = parameter
      /* c8 ignore next -- a member with ranges of thousands of parameters */
      if (index % PARAMETERS_PER_YIELD === PARAMETERS_PER_YIELD - 1) yield
      if (known?.opened && !known.ranges?.[index].equals(ranges[index])) {
        const message = `rank ${rank} has other ranges of parameter '${name}' in this run: open it with the same, or once the others have left`
        throw new ServiceError('RUN_MISMATCH', message, { parameter: index })
      }
      this.#checkOverlap(parameter, rank, ranges)
    }
  }

  /** Takes a rank's ranges over, which `checking` has found to fit, or those that it had; answers them. */
  declare({ rank, ranges = this.ranges(rank) }: Seat): readonly Ranges[] | undefined {
    if (ranges) {
      for (const [other, { opened, ranges: theirs }] of this.#ranks) {
        const isForeign = other !== rank && !opened
        if (isForeign && theirs?.some((each, i) => each.overlap(ranges[i]))) this.#ranks.delete(other)
      }
    }
    this.#ranks.set(rank, { ranges, opened: true })
    this.#gap = undefined
    return ranges
  }

  /** The ranks that have not opened the run. */
  get missing(): number[] {
    return this.all.filter((rank) => !this.#ranks.get(rank)?.opened)
  }

  get all(): number[] {
    return Array.from({ length: this.world_size }, (_, rank) => rank)
  }

  /** The number of a rank among all members of the run. */
  idOf(rank: number): number {
    return memberId({ rank, world_size: this.world_size, replica: this.replica })
  }

  /** The ranks that have elements of a parameter. */
  owners({ index }: Parameter): number[] {
    return [...this.#ranks].flatMap(([rank, { ranges }]) => (!ranges || ranges[index].elements > 0 ? [rank] : []))
  }

  /**
   * Throws RANGE_MISSING where the ranges that are known leave elements out. Those of a rank that has lost its
   * connection count: it comes back.
   */
  checkCovered(step: number): void {
    this.#gap ??= this.#firstGap() ?? null
    if (this.#gap === null) return
    const { parameter, range } = this.#gap
    const { missing } = this
    const who = missing.length > 0 ? `ranks that have not opened: ${missing.join(', ')}` : 'all ranks have opened'
    throw new ServiceError(
      'RANGE_MISSING',
      `no rank has elements [${range}) of parameter '${parameter.name}' in step ${step}; ${who}`,
      { parameter: parameter.index, step },
    )
  }

  #checkOverlap({ index, name }: Parameter, rank: number, ranges: readonly Ranges[]): void {
    for (const [other, { opened, ranges: theirs }] of this.#ranks) {
      const both = other !== rank && opened ? theirs?.[index].overlap(ranges[index]) : undefined
      if (!both) continue
      const message = `ranks ${other} and ${rank} both have elements [${both}) of parameter '${name}'`
      throw new ServiceError('PARAMETER_INVALID', message, { parameter: index })
    }
  }

  #firstGap(): Gap | undefined {
    const ranks: (readonly Ranges[])[] = []
    for (const { ranges } of this.#ranks.values()) {
      if (!ranges) return undefined
      ranks.push(ranges)
    }
    for (const parameter of this.#parameters) {
      const parts = ranks.map((ranges) => ranges[parameter.index])
      if (parts.reduce((sum, { elements }) => sum + elements, 0) === parameter.elements) continue
      const sorted = parts.flatMap((part) => [...part.list()]).sort(([one], [other]) => one - other)
      return { parameter, range: gapOf(sorted, parameter.elements) }
    }
    return undefined
  }
}

/** The first elements that no range has, of ranges that do not overlap and leave some out. */
function gapOf(sorted: readonly Range[], elements: number): Range {
  let end = 0
  for (const [start, stop] of sorted) {
    if (start > end) return [end, start]
    end = stop
  }
  return [end, elements]
}
