/**
 * What a value of a file must be: `problem` is undefined for one that is, and else says where it is not, with the value
 * and what was expected. `of` is never there: it gives a rule the type of its values.
 */
export type Rule<T> = { readonly problem: (value: unknown, path: string) => string | undefined; readonly of?: T }

/** A rule for each key of a record; a key whose type has undefined may be left out. */
export type Rules<T> = { readonly [Key in keyof T]-?: Rule<T[Key]> }

const MOST_SHOWN = 80

/** A value that a condition holds for; `expected` says it in words. */
export function rule<T>(expected: string, holds: (value: unknown) => boolean): Rule<T> {
  return {
    problem: (value, path) => (holds(value) ? undefined : `${path} is ${shown(value)}, expected ${expected}`),
  }
}

export const count = rule<number>('a count', (value) => Number.isSafeInteger(value) && Number(value) >= 0)
export const natural = rule<number>('a count above 0', (value) => Number.isSafeInteger(value) && Number(value) > 0)
/** JSON has neither infinity nor NaN. */
export const finite = rule<number>('a number', (value) => Number.isFinite(value))
export const atLeastZero = rule<number>(
  'a number of 0 or more',
  (value) => Number.isFinite(value) && Number(value) >= 0,
)
export const bool = rule<boolean>('true or false', (value) => typeof value === 'boolean')
export const map = rule<Readonly<Record<string, unknown>>>('a map', isMap)
export const sha256 = text('a SHA-256 in hexadecimal', /^[0-9a-f]{64}$/)

/** A text, of a form where one is given. */
export function text(expected = 'a text', form = /^/): Rule<string> {
  return rule(expected, (value) => typeof value === 'string' && form.test(value))
}

export function oneOf<T extends string | number | boolean>(...values: readonly T[]): Rule<T> {
  return rule(values.map(shown).join(' or '), (value) => values.some((known) => known === value))
}

export function optional<T>({ problem }: Rule<T>): Rule<T | undefined> {
  return { problem: (value, path) => (value === undefined ? undefined : problem(value, path)) }
}

/** What may also be null, as JSON writes an infinity. */
export function nullable<T>({ problem }: Rule<T>): Rule<T | null> {
  return { problem: (value, path) => (value === null ? undefined : problem(value, path)) }
}

export function list<T>(item: Rule<T>): Rule<T[]> {
  return {
    problem: (value, path) => {
      if (!Array.isArray(value)) return `${path} is ${shown(value)}, expected a list`
      return first(value.entries(), ([index, each]) => item.problem(each, `${path}[${index}]`))
    },
  }
}

/** A map whose keys may be any, and whose values all have one rule. */
export function dictionary<T>(item: Rule<T>): Rule<Record<string, T>> {
  return {
    problem: (value, path) => {
      if (!isMap(value)) return `${path} is ${shown(value)}, expected a map`
      return first(Object.entries(value), ([key, each]) => item.problem(each, `${path}.${key}`))
    },
  }
}

/** A map of known keys. An unknown one is refused: whoever wrote it meant something by it. */
export function record<T>(rules: Rules<T>): Rule<T> {
  const known = Object.entries<Rule<unknown>>(rules)
  return {
    problem: (value, path) => {
      if (!isMap(value)) return `${path} is ${shown(value)}, expected a map`
      const inside = path === '' ? '' : `${path}.`
      const unknown = Object.keys(value).find((key) => !Object.hasOwn(rules, key))
      if (unknown !== undefined) return `${inside}${unknown} is unknown`
      return first(known, ([key, { problem }]) => problem(value[key], inside + key))
    },
  }
}

/** The first problem of some items. */
function first<T>(items: Iterable<T>, problemOf: (item: T) => string | undefined): string | undefined {
  for (const item of items) {
    const problem = problemOf(item)
    if (problem !== undefined) return problem
  }
  return undefined
}

function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function shown(value: unknown): string {
  const json = JSON.stringify(value) ?? 'undefined'
  return json.length > MOST_SHOWN ? `${json.slice(0, MOST_SHOWN)}…` : json
}
