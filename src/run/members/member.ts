import type { WireDtype } from '../../../kernels/dtype.js'
import type { Ticket } from '../../device/device.js'
import type { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { MemberDeclaration, MemberStatus, Quorum } from '../../wire/frame.js'
import { Extent, Ranges } from '../../wire/ranges.js'

/** The connection that a member speaks through. */
export type Connection = {
  /** Ends the connection with 4409: another one has taken its place in the run. */
  fence(): void
  /** Ends the connection because its run is gone or the device has failed. */
  expel(error: ServiceError): void
  /** Another member of the run has opened it, or was lost. */
  changed(status: MemberStatus): void
}

/** Which member of a run, by rank and replica; left out, `replica` is 0 of 1. */
export type Position = MemberDeclaration

/**
 * The place of a member in a run: `ranges` are its elements of each parameter, left out where it has all of them,
 * `quorum` is what it asks for, and `weights` a digest of those that it begins with.
 */
export type Seat = Position & {
  readonly ranges?: readonly Ranges[]
  readonly quorum?: Quorum
  readonly weights?: string
}

/** The number of a member among all of its run, replica after replica. */
export function memberId({ rank, world_size, replica = 0 }: Position): number {
  return replica * world_size + rank
}

/** A run's only member, which sends and receives everything. */
export const ONLY: Seat = { rank: 0, world_size: 1 }

/**
 * One connection's place in a run, from the `open` that gave it until it is lost. It sends and receives its elements of
 * each parameter; a run's only member has all of them.
 */
export class Member {
  readonly id: number
  readonly rank: number
  readonly world_size: number
  readonly replica: number
  readonly replicas: number
  /** Cancelled when the member is lost: jobs of its own that no lane has begun are dropped. */
  readonly ticket: Ticket = { cancelled: false }
  readonly #connection: Connection | undefined
  readonly #ranges: readonly Ranges[] | undefined
  /** By dtype and number of elements, where it has all of them: a step asks for thousands, of a few sizes. */
  readonly #whole = new Map<WireDtype, Map<number, Extent>>()

  /** A journal whose steps are computed again is a member without a connection: nobody can take its place. */
  constructor(connection?: Connection, { ranges, ...position }: Seat = ONLY) {
    const { rank, world_size, replica = 0, replicas = 1 } = position
    this.id = memberId(position)
    this.rank = rank
    this.world_size = world_size
    this.replica = replica
    this.replicas = replicas
    this.#connection = connection
    this.#ranges = ranges
  }

  get lost(): boolean {
    return this.ticket.cancelled
  }

  /** Who it is, in words. */
  get name(): string {
    return this.replicas > 1 ? `rank ${this.rank} of replica ${this.replica}` : `rank ${this.rank}`
  }

  /** Whether it has elements of a parameter. */
  has(parameter: Parameter): boolean {
    return this.elements(parameter) > 0
  }

  /** How many elements of a parameter it has. */
  elements(parameter: Parameter): number {
    return this.#of(parameter).elements
  }

  /** The bytes of a parameter's gradient that it sends. */
  gradient(parameter: Parameter): Extent {
    return this.#extent(parameter, parameter.gradient_dtype)
  }

  /** The bytes of a parameter's update that it receives. */
  update(parameter: Parameter): Extent {
    return this.#extent(parameter, parameter.update_dtype)
  }

  /** Its connection is gone. */
  lose(): void {
    this.ticket.cancelled = true
  }

  /** Another connection has taken its place. */
  fence(): void {
    this.lose()
    this.#connection?.fence()
  }

  /** Tells the connection why it has to go. */
  expel(error: ServiceError): void {
    this.#connection?.expel(error)
  }

  /** Tells the connection that another member has opened the run or was lost. */
  changed(status: MemberStatus): void {
    this.#connection?.changed(status)
  }

  #extent(parameter: Parameter, dtype: WireDtype): Extent {
    if (this.#ranges) return Extent.of(dtype, this.#of(parameter))
    const bySize = this.#whole.get(dtype) ?? new Map<number, Extent>()
    const extent = bySize.get(parameter.elements) ?? Extent.of(dtype, this.#of(parameter))
    bySize.set(parameter.elements, extent)
    this.#whole.set(dtype, bySize)
    return extent
  }

  #of({ index, elements }: Parameter): Ranges {
    return this.#ranges ? this.#ranges[index] : Ranges.whole(elements)
  }
}
