import type { Ticket } from '../../device/device.js'
import { ServiceError } from '../../errors.js'
import type { Member } from '../members/member.js'
import type { Answer, GradientPlaces, Update } from '../place.js'
import type { Step } from './step.js'

/** A member's part of a gradient, which has come whole. */
export type Part = GradientPlaces & { step: Step; index: number; member: Member; repeated?: Repeated }

/** A gradient of which all parts have come; `explain`, if there is one, says more of the error that refuses it. */
export type Whole = GradientPlaces & {
  step: Step
  index: number
  ticket: Ticket
  explain?: (error: unknown) => Promise<unknown>
}

/** A part of a gradient that was applied before: it is not stored, but held against the bytes that were applied. */
export type Repeated = { differs: boolean }

/** Where a member's part of a gradient is received. */
export type Receiver = { region: Region; repeated?: Repeated }

/** Computes a gradient that is whole. */
export type Compute = (whole: Whole, answer: Answer) => void

export type Region = GradientPlaces['gradient']
/** A part that waits for its answer. */
export type Waiting = Part & { resolve: (update: Update | undefined) => void; reject: (error: unknown) => void }

/** One parameter's gradient, as far as it has come. */
export class Slot {
  /** The parts of one step that wait for the others, by rank. */
  readonly parts = new Map<number, Waiting>()
  /** Grows with each part that comes or goes. */
  version = 0
  computing = false
  /** Ranks whose elements in the buffer are of a later step than the update that is kept. */
  readonly spoiled = new Set<number>()
}

/** The refusal of a gradient of a finished step, of which a member that is further sends no more. */
export function passed({ index, step }: { index: number; step: Step }, expected_step: number): ServiceError {
  const message = `step ${step.number} of parameter ${index} cannot be computed again: a member has begun step ${expected_step}`
  return new ServiceError('STEP_CONFLICT', message, { parameter: index, step: step.number, expected_step })
}
