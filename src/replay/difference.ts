import { appliedOf, fingerprintText } from '../run/record.js'
import type { StoredGradient, StoredStep } from '../store/journal/journal-reader.js'
import type { Course } from './course.js'

/** A value that was computed again, and the journal's. */
export type Pair = { readonly computed: string; readonly journal: string }

/** The first step that is not what the journal says, and the first parameter of it, where one is. */
export type Difference = {
  readonly step: number
  /** The file and the record of the step's end. */
  readonly record: string
  readonly digest: Pair
  readonly parameter?: { readonly name: string; readonly record: string; readonly what: string } & Pair
}

/** What a parameter adds to a step's digest, in words. The replicas of a mean are the journal's, unchecked. */
const COMPARED = [
  ['gradientFingerprint', 'the fingerprint of its gradient'],
  ['updateFingerprint', 'the fingerprint of its update'],
  ['scale', 'scale'],
  ['decay', 'decay'],
  ['gradient_scale', 'gradient_scale'],
] as const

/** What of a step that a course has ended is not what the journal says; undefined where all is. */
export function differenceOf(stored: StoredStep, course: Course, digest: string): Difference | undefined {
  const sorted = stored.gradients.toSorted((one, other) => one.parameter - other.parameter)
  const [parameter] = sorted.flatMap((gradient) => differingParameter(gradient, course) ?? [])
  if (parameter === undefined && digest === stored.end.digest) return undefined
  return {
    step: stored.step,
    record: stored.label,
    digest: { computed: digest, journal: stored.end.digest },
    ...(parameter && { parameter }),
  }
}

function differingParameter(
  { parameter: index, applied, label }: StoredGradient,
  course: Course,
): Difference['parameter'] {
  const record = course.record(index)
  const journal = appliedOf(applied)
  const found = record && COMPARED.find(([key]) => record[key] !== journal[key])
  if (!found) return undefined
  const [key, what] = found
  const { name } = course.parameters[index]
  return { name, record: label, what, computed: shown(record[key]), journal: shown(journal[key]) }
}

function shown(value: bigint | number): string {
  return typeof value === 'bigint' ? fingerprintText(value) : String(value)
}
