import type { ParameterDeclaration } from '../../wire/frame.js'
import { type SafetensorsDtype, SafetensorsError } from '../safetensors.js'
import { FORMAT, type GroupRecord } from './manifest.js'

/** A group of a state: the hyperparameters that say what its numbers mean. */
export type StateGroup = Pick<GroupRecord, 'name' | 'algorithm' | 'hyperparameters'>

/** All of a run's state but its tensors. */
export type StateDescription = {
  run: string
  step: number
  digest: string
  groups: readonly StateGroup[]
  parameters: readonly ParameterDeclaration[]
}

/** A tensor of a state. Its name is that in a checkpoint, `state.<parameter>.<tensor>`. */
export type SourceTensor = { name: string; dtype: SafetensorsDtype; shape: readonly number[]; bytes: number }

/**
 * A run's state, in a checkpoint or in a service. The update counts, `state.<parameter>.step`, one of each parameter,
 * come before all other tensors.
 */
export type StateSource = {
  description: StateDescription
  tensors: readonly SourceTensor[]
  /** The bytes of every tensor, in the order of `tensors`. Throws, at the latest behind the last, for damaged bytes. */
  read(): AsyncGenerator<{ tensor: number; piece: Uint8Array }>
  close(): Promise<void>
}

/** The name of a parameter's state tensor in a file: torch's flattened name. */
export function stateName(parameter: string, tensor: string): string {
  return `state.${parameter}.${tensor}`
}

/**
 * The metadata of a safetensors file with a state. `momentum_form` is a map in JSON from each parameter whose algorithm
 * has a momentum_form to it.
 */
export function stateMetadata({ run, step, digest, groups, parameters }: StateDescription): Record<string, string> {
  const byName = new Map(groups.map((group) => [group.name, group.hyperparameters.momentum_form]))
  const forms = parameters.map(({ name, group }) => [name, byName.get(group)] as const)
  const records = groups.map(({ name, algorithm, hyperparameters }) => ({ name, algorithm, hyperparameters }))
  return {
    format: 'pt',
    muond: String(FORMAT),
    ...{ run, step: String(step), digest },
    momentum_form: JSON.stringify(Object.fromEntries(forms.filter(([, form]) => form !== undefined))),
    groups: JSON.stringify(records),
    parameters: JSON.stringify(parameters),
  }
}

/** Reads the metadata that `stateMetadata` has written. Throws SafetensorsError where it is missing. */
export function describeState(metadata: Readonly<Record<string, string>>): StateDescription {
  const { muond, run, step, digest, groups, parameters } = metadata
  if (muond !== String(FORMAT) || groups === undefined || parameters === undefined)
    throw new SafetensorsError(`it says that it is format ${muond} of muond, expected ${FORMAT}`)
  return { run, step: Number(step), digest, groups: JSON.parse(groups), parameters: JSON.parse(parameters) }
}
