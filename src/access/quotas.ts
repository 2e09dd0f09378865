import { ServiceError } from '../errors.js'
import { natural, optional, type Rule, record, rule } from '../store/rules.js'
import type { Principal } from './principal.js'

/** The most of each that a key may have; one that is left out is bounded by the service alone. */
export type Quotas = {
  /** Runs, in memory or on the disk, and what they have together: parameters, and bytes of state. */
  readonly runs?: number | undefined
  readonly parameters?: number | undefined
  readonly state_bytes?: number | undefined
  /** Streams and event streams at a time. */
  readonly connections?: number | undefined
  /**
   * Bytes of gradients, on whatever transport, and of state that is read or imported over REST; what is faster waits.
   */
  readonly bytes_per_second?: number | undefined
}

/** A slower stream would look like one that has stopped. */
const LEAST_BYTES_PER_SECOND = 2 ** 20

export const quotasRule: Rule<Quotas> = record<Quotas>({
  runs: optional(natural),
  parameters: optional(natural),
  state_bytes: optional(natural),
  connections: optional(natural),
  bytes_per_second: optional(
    rule<number>(`a count of ${LEAST_BYTES_PER_SECOND} or more`, (value) => {
      return Number.isSafeInteger(value) && Number(value) >= LEAST_BYTES_PER_SECOND
    }),
  ),
})

/** What a run takes of a key's quotas. */
export type RunSize = { readonly name: string; readonly parameters: number; readonly state_bytes: number }
export type Usage = Record<'runs' | 'parameters' | 'state_bytes', number>

const WORDS = { runs: 'runs', parameters: 'parameters', state_bytes: 'bytes of state' } as const
const KINDS = ['runs', 'parameters', 'state_bytes'] as const

/** Holds the runs that a key makes against its quotas. The runs of a key are all that it sees, whoever made them. */
export class RunQuotas {
  readonly #known: () => Iterable<RunSize>
  /** Runs that are being made, and are not among the known ones yet. */
  readonly #coming = new Set<RunSize>()

  constructor(known: () => Iterable<RunSize>) {
    this.#known = known
  }

  /** What the runs of a principal take. */
  usage(principal: Principal): Usage {
    const usage = { runs: 0, parameters: 0, state_bytes: 0 }
    for (const run of [...this.#known(), ...this.#coming]) {
      if (!principal.sees(run.name)) continue
      usage.runs += 1
      usage.parameters += run.parameters
      usage.state_bytes += run.state_bytes
    }
    return usage
  }

  /**
   * Counts a run that a principal makes, until `release` is called: by then it is known, or was not made. Throws
   * OVER_CAPACITY.
   */
  reserve(principal: Principal, run: RunSize): () => void {
    const usage = this.usage(principal)
    const more = { ...run, runs: 1 }
    for (const kind of KINDS) {
      const limit = principal.quotas[kind]
      const needed = usage[kind] + more[kind]
      if (limit === undefined || needed <= limit) continue
      const remedy = `delete a run (DELETE /v1/runs/{run}), or raise quotas.${kind} of the key`
      const message = `with run '${run.name}' the key '${principal.name}' has ${needed} ${WORDS[kind]}, its quota is ${limit}: ${remedy}`
      throw new ServiceError('OVER_CAPACITY', message)
    }
    this.#coming.add(run)
    return () => void this.#coming.delete(run)
  }
}
