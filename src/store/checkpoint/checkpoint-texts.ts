import type { Manifest, RunRecord } from './manifest.js'
import type { StateEntry } from './state-files.js'

// What a checkpoint says twice: for people, and for the libraries of others.

/** The momentum_form of each group and the dtype of each tensor. */
export function forPeople(
  { groups }: Pick<RunRecord, 'groups'>,
  entries: readonly StateEntry[],
): Pick<Manifest, 'momentum_form' | 'dtypes'> {
  return {
    momentum_form: Object.fromEntries(groups.map(({ name, hyperparameters }) => [name, hyperparameters.momentum_form])),
    dtypes: Object.fromEntries(entries.map(({ name, dtype }) => [name, dtype])),
  }
}

/** Every hyperparameter under torch.distributed's flattened name for it, `param_groups.<parameter>.<key>`, as JSON. */
export function groupsText({ parameters, groups }: Pick<RunRecord, 'parameters' | 'groups'>): string {
  const byName = Object.fromEntries(
    groups.map(({ name, algorithm, hyperparameters }) => [name, { algorithm, ...hyperparameters }]),
  )
  const rows = parameters.flatMap(({ name, group }) =>
    Object.entries(byName[group]).map(([key, value]) => [`param_groups.${name}.${key}`, value] as const),
  )
  return `${JSON.stringify(Object.fromEntries(rows), null, 2)}\n`
}
