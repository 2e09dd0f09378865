import type { Config } from '../../config.js'
import { ServiceError } from '../../errors.js'
import type { Parameter } from '../../optimizer/parameter.js'
import type { Run } from '../../run/run.js'
import type { Header, TensorRange } from '../../store/safetensors.js'
import { STEP_BYTES, type StepFrame, TRACEPARENT } from '../../wire/frame.js'
import { frameOfJson } from '../../wire/json-frame.js'
import { tensorDtype } from './dtypes.js'

/** What the header of a file of gradients says of a step of a run. */
export type GivenStep = {
  /** The parameter of each tensor, by its name. */
  parameters: ReadonlyMap<string, Parameter>
  /** Indices of the parameters without a gradient. */
  skipped: readonly number[]
  /** The values of the step; undefined where the file has none. */
  frame: StepFrame | undefined
}

/** Of `__metadata__`: values of the step as a `step` frame has them. */
const VALUES: ReadonlySet<string> = new Set(['groups', 'gradient_scale', 'max_logits'])
const SKIPPED = 'skipped'
/** Many writers of safetensors name the framework that a file comes from. */
const FORMAT = 'format'
const NAMES_IN_MESSAGE = 10

const SLACK_BYTES = 65_536
const ENTRY_BYTES = 512
/** A character that JSON escapes takes six bytes. */
const ESCAPED = 6
/** Text of a number, and of what stands around it, for each of its bytes in a frame. */
const AS_TEXT = 4

/** Most bytes that the header of a file of gradients may have, whoever wrote it. */
export function headerLimit({ parameters }: Run): number {
  const entries = parameters.reduce((sum, { name, shape }) => {
    // The name of a skipped parameter stands in a text in the text.
    return sum + ENTRY_BYTES + 2 * ESCAPED * Buffer.byteLength(name) + 16 * shape.length
  }, 0)
  return SLACK_BYTES + AS_TEXT * STEP_BYTES + entries
}

/**
 * Holds the header of a file of gradients against a run: afterwards only numbers can be wrong. Throws
 * PARAMETER_UNKNOWN, SHAPE_MISMATCH, DTYPE_UNSUPPORTED, STEP_INCOMPLETE for a parameter that is neither there nor
 * skipped, STEP_CONFLICT for one that is both, REQUEST_INVALID for metadata that are no JSON or have unknown keys, and
 * as reading a `step` frame.
 */
export function readGivenStep(
  run: Run,
  { step, traceparent = '', header }: { step: number; traceparent?: string | undefined; header: Header },
  config: Config,
): GivenStep {
  const known = new Map(run.parameters.map((parameter) => [parameter.name, parameter]))
  const find = (name: string): Parameter => {
    const parameter = known.get(name)
    if (parameter) return parameter
    throw new ServiceError('PARAMETER_UNKNOWN', `run '${run.name}' has no parameter '${name}'`, { step })
  }
  const parameters = new Map(header.ranges.map((range) => [range.name, checked(find(range.name), range)]))
  const values = valuesOf(header.metadata)
  const skipped = skippedOf(values).map((name) => find(name))
  checkWhole(run, { step, parameters, skipped })
  delete values[SKIPPED]
  const span = TRACEPARENT.test(traceparent) ? { traceparent } : {}
  const given = { ...values, ...span }
  const frame = Object.keys(given).length > 0 ? frameOfJson('step', { ...given, step }, config) : undefined
  return { parameters, skipped: skipped.map(({ index }) => index), frame }
}

function checked(parameter: Parameter, { name, dtype, shape }: TensorRange): Parameter {
  const { index, gradient_dtype, update_dtype } = parameter
  const expected = tensorDtype(parameter, gradient_dtype)
  tensorDtype(parameter, update_dtype)
  if (dtype !== expected) {
    const message = `the gradient of parameter '${name}' is ${dtype}, expected ${expected}, its gradient_dtype`
    throw new ServiceError('DTYPE_UNSUPPORTED', message, { parameter: index })
  }
  if (String(shape) === String(parameter.shape)) return parameter
  const message = `the gradient of parameter '${name}' has shape [${shape}], expected [${parameter.shape}]`
  throw new ServiceError('SHAPE_MISMATCH', message, { parameter: index })
}

/** The values of `__metadata__`, each of which is JSON. */
function valuesOf(metadata: Header['metadata']): Record<string, unknown> {
  const entries = Object.entries(metadata).filter(([key]) => key !== FORMAT)
  return Object.fromEntries(entries.map(([key, text]) => [key, parsed(key, text)]))
}

function parsed(key: string, text: string): unknown {
  const known = [...VALUES, SKIPPED]
  if (!known.includes(key)) {
    const expected = [...known, FORMAT].join(', ')
    throw new ServiceError('REQUEST_INVALID', `__metadata__ has the key '${key}', expected ones are ${expected}`)
  }
  try {
    return JSON.parse(text)
  } catch (error) {
    throw new ServiceError('REQUEST_INVALID', `__metadata__ '${key}' is no JSON: ${String(error)}`)
  }
}

function skippedOf({ [SKIPPED]: names = [] }: Record<string, unknown>): string[] {
  if (Array.isArray(names) && names.every((name) => typeof name === 'string')) return names
  throw new ServiceError('REQUEST_INVALID', `__metadata__ '${SKIPPED}' is no list of the names of parameters`)
}

function checkWhole(
  run: Run,
  { step, parameters, skipped }: { step: number; parameters: GivenStep['parameters']; skipped: readonly Parameter[] },
): void {
  const both = skipped.find(({ name }) => parameters.has(name))
  if (both) {
    const fields = { parameter: both.index, step }
    throw new ServiceError('STEP_CONFLICT', `parameter '${both.name}' has a gradient and is skipped`, fields)
  }
  const without = new Set(skipped)
  const missing = run.parameters.filter((parameter) => !parameters.has(parameter.name) && !without.has(parameter))
  if (missing.length === 0) return
  const names = missing.slice(0, NAMES_IN_MESSAGE).map(({ name }) => `'${name}'`)
  const more = missing.length > names.length ? ` and ${missing.length - names.length} more` : ''
  const message = `step ${step} has no gradient of ${names.join(', ')}${more}: send it, or list it in '${SKIPPED}'`
  throw new ServiceError('STEP_INCOMPLETE', message, { step, parameter: missing[0].index })
}
