import { ConfigError } from '../config.js'
import type { ForeignState } from '../exchange/foreign/file-tensor.js'
import type { Origin } from '../exchange/foreign/foreign-file.js'
import type { Parameter } from '../optimizer/parameter.js'

export type Match = { parameter: Parameter; state: ForeignState }

/** How a file's parameters are paired with a run's: by order, or by name, where a map may translate some names. */
export type MatchBy = { order: true } | { names: ReadonlyMap<string, string> }

/** Pairs each parameter of a file that has state with one of the run. Throws ConfigError where the run has none. */
export function match(
  states: readonly ForeignState[],
  parameters: readonly Parameter[],
  by: MatchBy,
  origin: Origin,
): Match[] {
  return 'order' in by ? matchOrder(states, parameters, origin) : matchNames(states, parameters, by.names)
}

function matchNames(
  states: readonly ForeignState[],
  parameters: readonly Parameter[],
  names: ReadonlyMap<string, string>,
): Match[] {
  const byName = new Map(parameters.map((parameter) => [parameter.name, parameter]))
  for (const key of names.keys()) {
    if (!states.some((state) => state.key === key || state.name === key))
      throw new ConfigError(`the map of names has '${key}', the file has no parameter of that name`)
  }
  const taken = new Map<Parameter, ForeignState>()
  return states.map((state) => {
    const name = names.get(labelOf(state)) ?? names.get(state.key) ?? state.name
    if (name === undefined)
      throw new ConfigError(`parameter ${state.key} of the file has no name there: give a map with --names, or --order`)
    // optax joins the keys of a tree with slashes.
    const parameter = byName.get(name) ?? byName.get(name.replaceAll('/', '.'))
    if (parameter === undefined)
      throw new ConfigError(`the file has state of '${name}', the run has no parameter of that name`)
    const other = taken.get(parameter)
    if (other) throw new ConfigError(`'${labelOf(other)}' and '${labelOf(state)}' of the file are both for '${name}'`)
    taken.set(parameter, state)
    return { parameter, state }
  })
}

function labelOf({ name, key }: ForeignState): string {
  return name ?? key
}

/**
 * Pairs parameters by order, among those with the same kinds of tensors: a file may have Muon's parameters before
 * AdamW's. KellerJordan/Muon, when distributed, sorts Muon's parameters by shape, so both sides are sorted for it.
 */
function matchOrder(states: readonly ForeignState[], parameters: readonly Parameter[], origin: Origin): Match[] {
  const withState = states.filter(({ tensors }) => tensors.size > 0)
  if (withState.length < states.length)
    throw new ConfigError(
      `${states.length - withState.length} parameters of the file have no state: --order cannot tell which they are`,
    )
  const kindOf = (names: Iterable<string>) =>
    [...names]
      .filter((name) => name !== 'second_momentum')
      .sort()
      .join(' and ')
  const kinds = new Map<string, ForeignState[]>()
  for (const state of withState) {
    const kind = kindOf(state.tensors.keys())
    kinds.set(kind, [...(kinds.get(kind) ?? []), state])
  }
  return [...kinds].flatMap(([kind, given]) => {
    const own = parameters.filter(({ state }) => kindOf(state.map(({ name }) => name)) === kind)
    if (own.length !== given.length)
      throw new ConfigError(`the file has ${given.length} parameters with ${kind}, the run has ${own.length}`)
    const [sorted, sortedOwn] =
      origin === 'keller-jordan' ? [byShape(given, shapeOf), byShape(own, ({ shape }) => shape)] : [given, own]
    return sortedOwn.map((parameter, i) => ({ parameter, state: sorted[i] }))
  })
}

function shapeOf({ tensors }: ForeignState): readonly number[] {
  const [first] = tensors.values()
  return first.shape
}

/** Sorts by shape, the largest first, as Python does: compares from the first dimension on, and keeps ties in order. */
function byShape<T>(items: readonly T[], of: (item: T) => readonly number[]): T[] {
  return [...items].sort((a, b) => {
    const [left, right] = [of(b), of(a)]
    const at = left.findIndex((size, i) => size !== right[i])
    return at < 0 ? left.length - right.length : left[at] - (right[at] ?? -1)
  })
}
