import { randomUUID } from 'node:crypto'
import { errorText, ServiceError } from '../../errors.js'
import { count, list, natural, type Rule, record, text } from '../../store/rules.js'
import type { Assignment } from '../assignment.js'

/**
 * What a coordinator keeps under a name: a value, and a mark of the write that put it there, by which a writer whose
 * answer was lost knows its own value again.
 */
export type Envelope<T> = { readonly mark: string; readonly value: T }

/** The url of a process, as the head of a run. */
export const headRule: Rule<string> = text('a url', /^https?:\/\//)

export const assignmentRule: Rule<Assignment> = record<Assignment>({
  run: text(),
  generation: natural,
  shards: list(record<Assignment['shards'][number]>({ peer: headRule, parameters: list(count) })),
})

/** A value with a mark of its own, as text. */
export function seal<T>(value: T): { mark: string; content: string } {
  const mark = randomUUID()
  return { mark, content: JSON.stringify({ mark, value } satisfies Envelope<T>) }
}

/** Throws COORDINATOR_FAILED for a text that no process of a cluster has written, with where it lies. */
export function unseal<T>(content: string, value: Rule<T>, where: string): Envelope<T> {
  const problem = problemOf(content, record<Envelope<T>>({ mark: text(), value }))
  if (typeof problem !== 'string') return problem.envelope
  throw new ServiceError('COORDINATOR_FAILED', `${where}: ${problem}`)
}

function problemOf<T>(content: string, envelope: Rule<Envelope<T>>): string | { envelope: Envelope<T> } {
  try {
    const parsed: unknown = JSON.parse(content)
    return envelope.problem(parsed, '') ?? { envelope: parsed as Envelope<T> }
  } catch (error) {
    return `no JSON: ${errorText(error)}`
  }
}
