/** A record with one wrong field: `path` as messages spell it, and the value that is wrong there. */
export type WrongField = { path: string; value: unknown; record: Record<string | number, unknown> }

type Path = readonly (string | number)[]

/**
 * Copies of a record in each of which one field, however deep inside, has a value of another type, or one of its own
 * type that is out of range. `isRight` says of which values that is not so.
 */
export function* wrongFields(
  record: object,
  isRight: (path: string, value: unknown) => boolean,
): Generator<WrongField, void> {
  for (const path of pathsOf(record)) {
    const spelled = path.reduce<string>((text, key) => text + spell(key, text === ''), '')
    for (const value of wrongs(path.reduce<unknown>((at, key) => Reflect.get(Object(at), key), record)))
      if (!isRight(spelled, value)) yield { path: spelled, value, record: changed(record, path, () => value) }
  }
}

/** A copy of a record with another value at a path. */
export function changed(record: object, path: Path, to: (value: unknown) => unknown): Record<string | number, unknown> {
  const copy: Record<string | number, unknown> = JSON.parse(JSON.stringify(record))
  const holder = path.slice(0, -1).reduce((at, key) => at[key] as Record<string | number, unknown>, copy)
  const [key] = path.slice(-1)
  holder[key!] = to(holder[key!])
  return copy
}

/** The paths to every value inside. */
function pathsOf(value: unknown, path: Path = []): Path[] {
  const inside = typeof value === 'object' && value !== null ? Object.entries(value) : []
  return inside.flatMap(([key, each]) => {
    const to = [...path, Array.isArray(value) ? Number(key) : key]
    return [to, ...pathsOf(each, to)]
  })
}

function wrongs(value: unknown): unknown[] {
  if (value === null) return ['1']
  if (typeof value === 'number') return ['1', -1.5e308, null]
  if (typeof value === 'string') return [5, {}]
  if (typeof value === 'boolean') return [0]
  return Array.isArray(value) ? [{}, 'text'] : [[], 7]
}

function spell(key: string | number, isFirst: boolean): string {
  if (typeof key === 'number') return `[${key}]`
  return isFirst ? key : `.${key}`
}
