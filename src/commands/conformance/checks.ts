import type { ErrorCode } from '../../errors.js'

/**
 * What is checked, in the order in which it is told. The first half is judged by what the client sends of itself; for
 * each of the others the service does something that it may do, and the client is watched.
 */
export const CHECKS = {
  frames: 'frames are binary messages with a map that the protocol allows',
  order: 'frames come in their order',
  chunks: 'chunks fit the parameter and limits.chunk_bytes',
  values: 'what the frames say fits the run',
  steps: 'steps count from 1, and have each gradient or skip it',
  answers: 'every gradient gets its update, after a lost connection too',
  arithmetic: 'W <- row_scale ⊙ ((1 - decay) · W + scale · data), once for each step',
  hyperparameters: 'a step frame gives hyperparameters or a gradient_scale',
  skipped: 'end names parameters without a gradient',
  checkpoint: 'a checkpoint frame',
  cuts: 'updates are cut into small chunks that alternate, in several fragments',
  unknown: 'unknown keys and unknown types of frames are ignored',
  ping: 'a ping is answered',
  slow: 'the service is slow',
  reconnect: 'the connection is cut within a step: open with takeover, send it again',
  receipt: 'the connection is cut before the receipt',
  overloaded: 'open is refused with OVERLOADED and retry_after_seconds',
  refused: 'the upgrade is refused with 503 DRAINING',
  draining: 'the service drains, and closes with 1012 after the step',
  'not-finite': 'a gradient is refused: send it again, skip it, or stop',
  'lost-run': 'the run comes back at an earlier step, or not: stop',
} as const

export type Check = keyof typeof CHECKS

export const CHECK_NAMES = Object.keys(CHECKS).filter(isCheck)

export function isCheck(name: string): name is Check {
  return Object.hasOwn(CHECKS, name)
}

/** Whose fault an error is that the service tells and that nothing here has provoked. */
export const BLAMED: Partial<Record<ErrorCode, Check>> = {
  FRAME_MALFORMED: 'frames',
  PROTOCOL_UNSUPPORTED: 'frames',
  FRAME_UNEXPECTED: 'order',
  FRAME_TOO_LARGE: 'chunks',
  SHAPE_MISMATCH: 'chunks',
  STEP_CONFLICT: 'steps',
  STEP_INCOMPLETE: 'steps',
  PARAMETER_INVALID: 'values',
  PARAMETER_UNKNOWN: 'values',
  DTYPE_UNSUPPORTED: 'values',
  HYPERPARAMETER_INVALID: 'values',
  GRADIENT_NOT_FINITE: 'values',
  MAX_LOGITS_INVALID: 'values',
  RUN_MISMATCH: 'values',
  RUN_NOT_FOUND: 'values',
  RUN_EXISTS: 'values',
  RUN_BUSY: 'reconnect',
}

export type Result = 'passed' | 'failed' | 'not seen'

/** Of one check: how often it held, and what was wrong. */
export type Row = { check: Check; result: Result; seen: number; faults: readonly string[] }

/** A fault that comes again with every frame is told this often. */
const FAULTS_KEPT = 3

/** What was found, check by check. */
export class Findings {
  readonly #found = new Map<Check, { seen: number; faults: string[] }>()
  readonly #tell: (check: Check, fault: string) => void

  /** `tell` hears of every fault that is kept, as soon as it is found. */
  constructor(tell: (check: Check, fault: string) => void = () => {}) {
    this.#tell = tell
  }

  pass(check: Check): void {
    this.#of(check).seen += 1
  }

  fail(check: Check, fault: string): void {
    const { faults } = this.#of(check)
    if (faults.length === FAULTS_KEPT || faults.includes(fault)) return
    faults.push(fault)
    this.#tell(check, fault)
  }

  rows(): Row[] {
    return CHECK_NAMES.map((check) => {
      const { seen, faults } = this.#of(check)
      const result = faults.length > 0 ? 'failed' : seen > 0 ? 'passed' : 'not seen'
      return { check, result, seen, faults }
    })
  }

  #of(check: Check): { seen: number; faults: string[] } {
    const found = this.#found.get(check) ?? { seen: 0, faults: [] }
    this.#found.set(check, found)
    return found
  }
}
