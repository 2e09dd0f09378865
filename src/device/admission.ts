import { ServiceError } from '../errors.js'
import { type Placement, placement } from './cuda/placement.js'
import { type Kernels, type Largest, largest, largestOf, scratchFor, stateInFlight, totalOf } from './cuda/scratch.js'
import type { Scratch } from './executor.js'
import type { Demand, GroupLimit } from './job.js'
import { GROUPS_PER_LANE } from './lanes/lanes.js'
import { aligned } from './staging.js'

/** The memory and the lanes that a device has for runs. */
export type Capacity = {
  readonly units: readonly {
    readonly name: string
    readonly bytes: number
    /** The kernels of the unit's lanes; left out where lanes set no memory of the unit aside. */
    readonly kernels?: Kernels
  }[]
  /** Bytes of host memory for gradients and updates; left out where they lie in the first unit's own memory. */
  readonly hostBytes?: number
  /** Lanes of each unit. */
  readonly lanes: number
  readonly group: GroupLimit
}

/** The memory that a run was granted. */
export type Grant = Placement & {
  readonly hostBytes: number
  /** Bytes of the memory that the run's gradients have beside the arena: its largest gradient fits. */
  readonly gradientBytes: number
  /** Bytes of the state of the run's largest parameter. */
  readonly largestState: number
  /** For each unit the largest sizes of the run's jobs; of no jobs where the unit's lanes set no memory aside. */
  readonly largest: readonly Largest[]
}

const STATE_REMEDY = 'delete a run, or start the service with a larger --state-bytes-limit'
// What the host has for them is a share of its memory, which no setting changes.
const HOST_REMEDY = 'delete a run, or use a host with more memory'

/** Grants runs their memory before they begin, so that no run lacks memory in the middle of a step. */
export class Admission {
  readonly #capacity: Capacity
  readonly #granted = new Set<Grant>()

  constructor(capacity: Capacity) {
    this.#capacity = capacity
  }

  /** Bytes that were granted on all units: of state, and of gradients and updates where they lie beside the state. */
  get bytes(): number {
    return sum([...this.#granted].flatMap(({ bytes }) => bytes))
  }

  /** Bytes of the state of the largest parameter of all runs. */
  get largestState(): number {
    return [...this.#granted].reduce((most, grant) => Math.max(most, grant.largestState), 0)
  }

  /**
   * Grants memory for `demands`, or refuses with OVER_CAPACITY and the numbers; `what` names the run in the refusal.
   */
  admit(demands: readonly Demand[], what: string): Grant {
    const grant = this.#grantFor(demands, this.#granted)
    this.#check(grant, what, this.#granted)
    this.#granted.add(grant)
    return grant
  }

  /** Throws what `admit` would if the runs with the grants `leaving` had left. */
  checkWithout(leaving: ReadonlySet<Grant>, demands: readonly Demand[], what: string): void {
    const staying = new Set([...this.#granted].filter((grant) => !leaving.has(grant)))
    this.#check(this.#grantFor(demands, staying), what, staying)
  }

  #grantFor(demands: readonly Demand[], granted: ReadonlySet<Grant>): Grant {
    const { units, hostBytes } = this.#capacity
    const parts = demands.map(({ state_bytes, held_bytes = 0, update_bytes }) => {
      return state_bytes + held_bytes + (hostBytes === undefined ? update_bytes : 0)
    })
    const taken = units.map((_, unit) => this.#state(unit, granted))
    const gradientBytes = aligned(demands.reduce((most, { gradient_bytes }) => Math.max(most, gradient_bytes), 0))
    const placed = placement(parts, taken)
    const isHost = hostBytes === undefined
    return {
      units: placed.units,
      bytes: placed.bytes.map((bytes, unit) => bytes + (isHost && unit === 0 ? gradientBytes : 0)),
      gradientBytes,
      largestState: demands.reduce((most, { state_bytes }) => Math.max(most, state_bytes), 0),
      hostBytes: isHost ? 0 : gradientBytes + sum(demands.map(({ update_bytes }) => update_bytes)),
      /* c8 ignore next -- only a GPU has kernels */
      largest: units.map(({ kernels }) => largestOf(kernels ? demands : [], kernels)),
    }
  }

  /** Grants state memory beside the runs', `bytes[i]` of unit i, or refuses as `admit` does. */
  reserve(bytes: readonly number[], what: string): Grant {
    const grant: Grant = {
      ...{ units: [], bytes, hostBytes: 0, gradientBytes: 0, largestState: 0 },
      largest: this.#capacity.units.map(({ kernels }) => largestOf([], kernels)),
    }
    this.#check(grant, what, this.#granted)
    this.#granted.add(grant)
    return grant
  }

  /**
   * Grants memory of the host for gradients and updates beside the runs', and what jobs of such `demands` need of a
   * lane, or refuses as `admit` does.
   */
  reserveHost(bytes: number, what: string, demands: readonly Demand[] = []): Grant {
    const { units, hostBytes } = this.#capacity
    const isHost = hostBytes === undefined
    const grant: Grant = {
      /* c8 ignore next 3 -- members of a run on a GPU: its memory beside the host's, and its kernels */
      ...{ units: [], gradientBytes: 0, largestState: 0, hostBytes: isHost ? 0 : bytes },
      bytes: units.map((_, unit) => (isHost && unit === 0 ? bytes : 0)),
      largest: units.map(({ kernels }) => largestOf(kernels ? demands : [], kernels)),
    }
    this.#check(grant, what, this.#granted)
    this.#granted.add(grant)
    return grant
  }

  dismiss(grant: Grant): void {
    this.#granted.delete(grant)
  }

  /** The scratch memory that each lane of a unit needs for all runs; undefined where lanes set no memory aside. */
  scratch(unit: number): Scratch | undefined {
    const all = this.#largest(unit, this.#granted)
    return all && scratchFor(all, this.#capacity.group)
  }

  #check(grant: Grant, what: string, granted: ReadonlySet<Grant>): void {
    const after = [...granted, grant]
    for (const [unit, { name, bytes }] of this.#capacity.units.entries()) {
      const before = this.#needed(unit, granted)
      const needs = this.#needed(unit, after) - before
      refuse(what, { where: `on ${name}`, needs, left: bytes - before, remedy: STATE_REMEDY })
    }
    const { hostBytes = 0 } = this.#capacity
    const left = hostBytes - sum([...granted].map((one) => one.hostBytes))
    refuse(what, { where: 'of the host for gradients and updates', needs: grant.hostBytes, left, remedy: HOST_REMEDY })
  }

  /** Bytes of state, of the next state of jobs that are computed at one time, and of the lanes' scratch memory. */
  #needed(unit: number, granted: Iterable<Grant>): number {
    const { lanes, group } = this.#capacity
    const state = this.#state(unit, granted)
    const all = this.#largest(unit, granted)
    if (all === undefined) return state
    const inFlight = Math.min(state, lanes * GROUPS_PER_LANE * stateInFlight(all, group))
    return state + inFlight + lanes * totalOf(scratchFor(all, group))
  }

  #state(unit: number, granted: Iterable<Grant>): number {
    return sum([...granted].map(({ bytes }) => bytes[unit]))
  }

  #largest(unit: number, granted: Iterable<Grant>): Largest | undefined {
    if (!this.#capacity.units[unit].kernels) return undefined
    return largest([...granted].map((grant) => grant.largest[unit]))
  }
}

type Lack = { where: string; needs: number; left: number; remedy: string }

function refuse(what: string, { where, needs, left, remedy }: Lack): void {
  if (needs <= left) return
  throw new ServiceError(
    'OVER_CAPACITY',
    `${what} needs ${needs} bytes of memory ${where}, ${left} are left: ${remedy}`,
  )
}

function sum(numbers: readonly number[]): number {
  return numbers.reduce((total, number) => total + number, 0)
}
