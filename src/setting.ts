const LIST_EXPECTED = 'be comma-separated, without spaces, none of them empty'
/** RFC 6750's token characters, and so many of them that nobody finds a key by trying. */
const KEY = '[A-Za-z0-9._~+/=-]{16,}'
const KEY_WORDS = 'at least 16 letters, digits and . _ ~ + / = -'

/**
 * A JSON schema and three words of our own: `expected` says what a value must be where the schema cannot, `list`
 * splits it, and a `secret` has no flag, as command lines are read by all, and stays out of messages.
 */
export type Setting = {
  type: 'string' | 'integer' | 'number' | 'boolean'
  default: string | number | boolean
  description: string
  expected?: string
  list?: true
  secret?: true
  [keyword: string]: unknown
}

export function text(value: string, description: string, rest: { expected?: string; [keyword: string]: unknown } = {}) {
  return { type: 'string', default: value, description, ...rest } as const
}

export function integer(value: number, [minimum, maximum]: [number, number], description: string) {
  return { type: 'integer', default: value, minimum, maximum, description } as const
}

export function seconds(value: number, [minimum, maximum]: [number, number], description: string) {
  return { type: 'number', default: value, minimum, maximum, description } as const
}

export function flag(description: string) {
  return { type: 'boolean', default: false, expected: 'be true or false', description } as const
}

/** No entry may be empty or have space around it: it would never be equal to anything. */
export function list(description: string) {
  const pattern = '^([^,\\s]+(,[^,\\s]+)*)?$'
  return { type: 'string', default: '', list: true, pattern, expected: LIST_EXPECTED, description } as const
}

/** No entry may be empty: a stray comma must not open the service. */
export function keys(description: string) {
  const pattern = `^(${KEY}(,${KEY})*)?$`
  const expected = `be comma-separated keys of ${KEY_WORDS}, none of them empty`
  return { type: 'string', default: '', list: true, secret: true, pattern, expected, description } as const
}

/** One key, or none. */
export function key(description: string) {
  const pattern = `^(${KEY})?$`
  return {
    type: 'string',
    default: '',
    secret: true,
    pattern,
    expected: `be one key of ${KEY_WORDS}`,
    description,
  } as const
}
