import { parseArgs } from 'node:util'

/** The flags of a command by name. `parseArgs` has lists for flags that may be given twice, which none is here. */
export type Flags = Readonly<Record<string, string | boolean | readonly (string | boolean)[] | undefined>>

/** The type of each flag that a command takes. */
export type FlagTypes = Readonly<Record<string, 'string' | 'boolean'>>

/**
 * Splits the arguments of a command into its flags and the rest; `-h` is `--help`. `problems` has a line for each flag
 * that is unknown or lacks its value: none of those is among `values`.
 */
export function scanArguments(
  argv: readonly string[],
  flags: FlagTypes,
): { values: Flags; positionals: readonly string[]; problems: string[] } {
  const options = Object.fromEntries(
    Object.entries(flags).map(([name, type]) => [name, name === 'help' ? { type, short: 'h' } : { type }]),
  )
  const { values, positionals, tokens } = parseArgs({
    ...{ args: [...argv], options, strict: false, allowPositionals: true, tokens: true },
  })
  const wrong = tokens.flatMap((token) => {
    const problem = token.kind === 'option' ? problemOf(token, flags) : undefined
    return problem === undefined ? [] : [{ ...problem, text: `${problem.text} (--help lists the flags)` }]
  })
  // What is wrong already is not looked at again.
  const fit = Object.entries(values).filter(([name]) => !wrong.some((problem) => problem.name === name))
  return { values: Object.fromEntries(fit), positionals, problems: wrong.map(({ text }) => text) }
}

/** What is wrong with a flag as it was given; a value that looks like a flag is one whose own value was forgotten. */
function problemOf(
  { name, rawName, value, inlineValue }: { name: string; rawName: string; value?: string; inlineValue?: boolean },
  flags: FlagTypes,
): { name: string; text: string } | undefined {
  const type = Object.hasOwn(flags, name) ? flags[name] : undefined
  if (type === undefined) return { name, text: `Unknown option '${rawName}'` }
  if (type === 'boolean') return value === undefined ? undefined : { name, text: `Option '${rawName}' takes no value` }
  if (value === undefined) return { name, text: `Option '${rawName} <value>' argument missing` }
  if (inlineValue || !value.startsWith('-')) return undefined
  return { name, text: `Option '${rawName}' is followed by another: write ${rawName}=… if that is its value` }
}
