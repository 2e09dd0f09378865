import { MuondError, type MuondErrorFields } from '../error.js'
import type { Part } from './part.js'

/** An error of a shard as one of the whole, which counts parameters otherwise. */
export function ofWhole(error: unknown, { indices }: Pick<Part, 'indices'>): unknown {
  if (!(error instanceof MuondError) || error.fields.parameter === undefined) return error
  return withFields(error, { ...error.fields, parameter: indices[error.fields.parameter] })
}

/**
 * The error that a step rejects with: one that says that nothing can go on, if there is any, else the first refusal,
 * with the names of all gradients that were refused.
 */
export function mergedRefusal(errors: readonly unknown[]): unknown {
  const other = errors.find((error) => !isRefusal(error))
  if (other !== undefined) return other
  const refusals = errors.filter(isRefusal)
  const [first] = refusals
  return withFields(first, { ...first.fields, refused: refusals.flatMap(({ fields }) => fields.refused) })
}

type Refusal = MuondError & { readonly fields: MuondErrorFields & { readonly refused: readonly string[] } }

function isRefusal(error: unknown): error is Refusal {
  return error instanceof MuondError && error.fields.refused !== undefined
}

function withFields(error: MuondError, fields: MuondErrorFields): MuondError {
  const { code, message, status, retryable, cause } = error
  return new MuondError(code, message, fields, { cause, retryable, ...(status !== undefined && { status }) })
}
