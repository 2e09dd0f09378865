import type { Shard } from '../shard.js'
import type { Step } from './step.js'

/** Facts of a finished step that no receipt has, since no client could hold them against its own. */
export type Measured = {
  /** An RFC 3339 time. */
  readonly finished_at: string
  /**
   * Wall-clock seconds from the end of the step before; for the first step of a process, from the step's first frame.
   */
  readonly wall_seconds: number
  /** Root of the mean square of all elements of the applied updates; 0 where none was applied. */
  readonly update_rms: number
  /** Bytes of the gradients that were applied, and of their updates: those of replays are not counted. */
  readonly gradient_bytes: number
  readonly update_bytes: number
}

/** Measures a step that ends now; `previous` is when the step before it ended, as `performance.now` counts. */
export function measured(step: Step, shard: Shard, previous: number | undefined): Measured {
  let [square, elements, gradient_bytes, update_bytes] = [0, 0, 0, 0]
  for (const { parameter, updateRms = 0 } of shard.applied(step)) {
    square += updateRms ** 2 * parameter.elements
    elements += parameter.elements
    gradient_bytes += parameter.gradient_bytes
    update_bytes += parameter.update_bytes
  }
  const now = performance.now()
  return {
    finished_at: new Date().toISOString(),
    wall_seconds: (now - (previous ?? step.clock.began)) / 1000,
    update_rms: Math.sqrt(square / Math.max(elements, 1)),
    gradient_bytes,
    update_bytes,
  }
}
