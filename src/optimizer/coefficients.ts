import {
  type CoefficientsName,
  expandCoefficients,
  NAMED_COEFFICIENTS,
  type Triple,
} from '../../kernels/orthogonalize/coefficients.js'

/** The hyperparameter `ns_coefficients`: one triple for all iterations, a triple for each, or a set by name. */
export type Coefficients = Triple | readonly Triple[] | CoefficientsName

export const MAX_NS_STEPS = 99

/** Whether a value is a finite float32: kernels take their scalars as float32, and 1e39 would be Inf to them. */
export const isNumber = (value: unknown): value is number =>
  typeof value === 'number' && Number.isFinite(Math.fround(value))

export function isCoefficients(value: unknown): value is Coefficients {
  return isTriple(value) || isTriples(value) || isNamedSet(value)
}

/** The coefficients of every Newton-Schulz iteration: a list of `ns_steps` triples. */
export function iterations({
  ns_coefficients,
  ns_steps,
}: {
  readonly ns_coefficients: Coefficients
  readonly ns_steps: number
}): Triple[] {
  if (typeof ns_coefficients === 'string') {
    return expandCoefficients(NAMED_COEFFICIENTS[ns_coefficients].coefficients, ns_steps)
  }
  return expandCoefficients(isTriple(ns_coefficients) ? [ns_coefficients] : ns_coefficients, ns_steps)
}

/** How many iterations a set of coefficients is made for; undefined for a single triple, which fits any number. */
export function stepsOf(coefficients: Coefficients): number | undefined {
  if (typeof coefficients === 'string') return NAMED_COEFFICIENTS[coefficients].ns_steps
  return isTriple(coefficients) ? undefined : coefficients.length
}

function isTriple(value: unknown): value is Triple {
  return Array.isArray(value) && value.length === 3 && value.every(isNumber)
}

function isTriples(value: unknown): value is readonly Triple[] {
  return Array.isArray(value) && value.length >= 1 && value.length <= MAX_NS_STEPS && value.every(isTriple)
}

function isNamedSet(value: unknown): value is CoefficientsName {
  return typeof value === 'string' && Object.hasOwn(NAMED_COEFFICIENTS, value)
}
