import type { ParameterDeclaration } from '../../wire/frame.js'
import { type SafetensorsDtype, SafetensorsError } from '../safetensors.js'
import { FORMAT, type GroupRecord } from './manifest.js'

/** What is to be known of a run's state beside its tensors. */
export type StateDescription = {
  run: string
  step: number
  digest: string
  groups: readonly Pick<GroupRecord, 'name' | 'algorithm' | 'hyperparameters'>[]
  parameters: readonly ParameterDeclaration[]
}

/** A tensor of a state, by the name that it has in a checkpoint: `state.<parameter>.<tensor>`. */
export type SourceTensor = { name: string; dtype: SafetensorsDtype; shape: readonly number[]; bytes: number }

/** A run's state, wherever it lies. The count of every parameter, `state.<parameter>.step`, comes before all other tensors. */
export type StateSource = {
  description: StateDescription
  tensors: readonly SourceTensor[]
  /** The bytes of every tensor, in the order of `tensors`; throws at its end at the latest where they are not what was written. */
  read(): AsyncGenerator<{ tensor: number; piece: Uint8Array }>
  close(): Promise<void>
}

/** The name of a parameter's tensor in a file. */
export function stateName(parameter: string, tensor: string): string {
  return `state.${parameter}.${tensor}`
}

/** What a safetensors file says of the state in it: `momentum_form` is that of every parameter whose algorithm has one. */
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

/** Reads back what `stateMetadata` has written. Throws SafetensorsError where it is not there. */
export function describeState(metadata: Readonly<Record<string, string>>): StateDescription {
  const { muond, run, step, digest, groups, parameters } = metadata
  if (muond !== String(FORMAT) || groups === undefined || parameters === undefined)
    throw new SafetensorsError(`it says that it is format ${muond} of muond, expected ${FORMAT}`)
  return { run, step: Number(step), digest, groups: JSON.parse(groups), parameters: JSON.parse(parameters) }
}
