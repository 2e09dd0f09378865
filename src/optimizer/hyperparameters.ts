import assert from 'node:assert'
import { inspect } from 'node:util'
import { checkCoefficients } from '../../kernels/orthogonalize/coefficients.js'
import { ServiceError } from '../errors.js'
import type { GroupDeclaration } from '../wire/frame.js'
import { iterations, stepsOf } from './coefficients.js'
import { type Algorithm, HYPERPARAMETERS, type Hyperparameters, type Table, type Values } from './table.js'

type GroupOf<A extends Algorithm> = {
  readonly name: string
  /** The name of the preset that the group was declared with. */
  readonly preset?: string
  readonly algorithm: A
  readonly hyperparameters: Hyperparameters<A>
  /**
   * The hyperparameters that the client set. `hyperparameters` completes them: an unset ns_steps follows
   * ns_coefficients.
   */
  readonly given: Readonly<Record<string, unknown>>
}
export type Group = { [A in Algorithm]: GroupOf<A> }[Algorithm]
/** The groups of a run by name. */
export type Groups = ReadonlyMap<string, Group>
/** A group as a manifest or a journal has it, read back from JSON. */
type KeptGroup = {
  readonly name: string
  readonly algorithm: string
  readonly preset?: string
  readonly given: Readonly<Record<string, unknown>>
  readonly hyperparameters: Readonly<Record<string, unknown>>
}

const TORCH_INTERNAL = 'it says how torch computes where it runs, not what; leave it out'
/** Keywords of torch's optimizers that no algorithm here has. */
const UNSUPPORTED: Readonly<Record<string, string>> = {
  maximize: 'send gradient_scale -1 with each step instead',
  foreach: TORCH_INTERNAL,
  fused: TORCH_INTERNAL,
  capturable: TORCH_INTERNAL,
  differentiable: 'no gradient flows through an update; leave it out',
  decoupled_weight_decay: 'weight decay never goes through the gradient here; adamw is Adam with it',
}

const MAX_NAME_LENGTH = 1024

/**
 * Checks a declared group and completes it with the defaults.
 * Throws PARAMETER_INVALID for the group's name, and HYPERPARAMETER_INVALID with the group, the key, its value and the
 * values that are allowed.
 */
export function parseGroup({ name, algorithm, ...given }: GroupDeclaration): Group {
  checkName('group', name)
  if (algorithm === undefined)
    throw refusal(name, `it has neither an algorithm nor a preset, expected ${expectedAlgorithm()}`)
  if (isAlgorithm(algorithm)) return checkSet(complete(name, algorithm, given))
  throw refusal(name, `algorithm is ${show(algorithm)}, expected ${expectedAlgorithm()}`)
}

function expectedAlgorithm(): string {
  return `one of ${Object.keys(HYPERPARAMETERS).join(', ')}`
}

/** A group with some hyperparameters changed, as a `step` frame asks for. Throws HYPERPARAMETER_INVALID. */
export function updateGroup(group: Group, changes: Readonly<Record<string, unknown>>): Group {
  const table: Table = HYPERPARAMETERS[group.algorithm]
  for (const key of Object.keys(changes)) {
    if (key === 'algorithm' || key === 'preset' || own(table, key)?.sticky === false) {
      throw refusal(group.name, `${key} is fixed at open, a step cannot change it to ${show(changes[key])}`)
    }
  }
  const { name, algorithm, given, preset } = group
  const next: Group = { ...complete(name, algorithm, { ...given, ...changes }), preset }
  return 'ns_coefficients' in changes || 'ns_steps' in changes ? checkSet(next) : next
}

/** A kept group with the values that were in force, whatever this version's defaults are. Throws as `parseGroup`. */
export function restoreGroup({ name, algorithm, preset, given, hyperparameters }: KeptGroup): Group {
  return { ...parseGroup({ ...hyperparameters, name, algorithm }), given, ...(preset !== undefined && { preset }) }
}

/** A group as `opened` and `receipt` list it: its algorithm, its preset, and every hyperparameter in force. */
export function effective(group: Group): { readonly algorithm: Algorithm; readonly [hyperparameter: string]: unknown } {
  const { algorithm, preset, hyperparameters } = group
  return { algorithm, ...(preset === undefined ? {} : { preset }), ...hyperparameters }
}

/** The first difference that makes the state of one group useless to the other; undefined where there is none. */
export function stateBearing(existing: Group, given: Group): string | undefined {
  const [before, after] = [effective(existing), effective(given)]
  const table: Table = HYPERPARAMETERS[existing.algorithm]
  const keys = ['algorithm', ...Object.keys(table).filter((key) => !table[key].sticky)]
  const key = keys.find((name) => before[name] !== after[name])
  return key && `${key} is ${show(before[key])} in the run, ${show(after[key])} given`
}

/** Refuses an empty or an overlong name: names are repeated in messages, receipts and files. */
export function checkName(what: string, name: string): void {
  if (name.length > 0 && name.length <= MAX_NAME_LENGTH) return
  const message = `the name of ${what} ${show(name)} has ${name.length} characters, expected 1 to ${MAX_NAME_LENGTH}`
  throw new ServiceError('PARAMETER_INVALID', message)
}

/**
 * A client's value as part of an error message: one line of about 120 characters, however large or deep the value is.
 */
export function show(value: unknown): string {
  const text = inspect(value, {
    compact: true,
    depth: 1,
    maxArrayLength: 8,
    maxStringLength: 80,
    breakLength: Number.POSITIVE_INFINITY,
  })
  return text.length > 120 ? `${text.slice(0, 120)}...` : text
}

function isAlgorithm(name: string): name is Algorithm {
  return Object.hasOwn(HYPERPARAMETERS, name)
}

/** `table[key]` without inherited keys: a client's key may be `constructor`. */
function own<T>(table: Readonly<Record<string, T>>, key: string): T | undefined {
  return Object.hasOwn(table, key) ? table[key] : undefined
}

function complete(name: string, algorithm: Algorithm, given: Readonly<Record<string, unknown>>): Group {
  checkKeys(name, algorithm, Object.keys(given))
  switch (algorithm) {
    case 'muon':
    case 'muonclip':
      return { name, algorithm, given, hyperparameters: muon(name, HYPERPARAMETERS[algorithm], given) }
    case 'adamw':
      return { name, algorithm, given, hyperparameters: read(name, HYPERPARAMETERS.adamw, given) }
    case 'adam':
      return { name, algorithm, given, hyperparameters: read(name, HYPERPARAMETERS.adam, given) }
    case 'rmsprop':
      return { name, algorithm, given, hyperparameters: read(name, HYPERPARAMETERS.rmsprop, given) }
    case 'sgd':
      return { name, algorithm, given, hyperparameters: sgd(name, given) }
  }
}

function checkKeys(name: string, algorithm: Algorithm, keys: readonly string[]): void {
  const known = Object.keys(HYPERPARAMETERS[algorithm])
  const key = keys.find((candidate) => !known.includes(candidate))
  if (key === undefined) return
  const reason = own(UNSUPPORTED, key)
  if (reason !== undefined) throw refusal(name, `${key} is not supported: ${reason}`)
  throw refusal(name, `${show(key)} is no hyperparameter of ${algorithm}, expected one of ${known.join(', ')}`)
}

function read<T extends Table>(name: string, table: T, given: Readonly<Record<string, unknown>>): Values<T> {
  const values = Object.entries(table).map(([key, rule]) => {
    if (!Object.hasOwn(given, key)) return [key, rule.default]
    if (rule.accepts(given[key])) return [key, given[key]]
    throw refusal(name, `${key} is ${show(given[key])}, expected ${rule.expected}`)
  })
  return Object.fromEntries(values)
}

function muon(
  name: string,
  table: (typeof HYPERPARAMETERS)['muon' | 'muonclip'],
  given: Readonly<Record<string, unknown>>,
): Hyperparameters<'muon'> {
  const values = read(name, table, given)
  const ns_steps = stepsOf(values.ns_coefficients) ?? values.ns_steps
  return 'ns_steps' in given ? values : { ...values, ns_steps }
}

function sgd(name: string, given: Readonly<Record<string, unknown>>): Hyperparameters<'sgd'> {
  const values = read(name, HYPERPARAMETERS.sgd, given)
  if (!values.nesterov || (values.momentum > 0 && values.dampening === 0)) return values
  const { momentum, dampening } = values
  throw refusal(
    name,
    `nesterov is true, momentum is ${momentum} and dampening is ${dampening}, expected momentum > 0 and dampening 0`,
  )
}

/** Refuses coefficients that are unsafe with `ns_steps` iterations. A pair that has passed needs no second check. */
function checkSet(group: Group): Group {
  if (group.algorithm !== 'muon' && group.algorithm !== 'muonclip') return group
  const { ns_coefficients, ns_steps } = group.hyperparameters
  const reason = checkCoefficients(iterations(group.hyperparameters))
  if (reason === undefined) return group
  throw refusal(
    group.name,
    `ns_coefficients is ${show(ns_coefficients)} with ns_steps ${ns_steps}, which is unsafe: ${reason}`,
  )
}

function refusal(name: string, message: string): ServiceError {
  return new ServiceError('HYPERPARAMETER_INVALID', `group ${show(name)}: ${message}`)
}

/** The group that a parameter is in. */
export function groupOf(parameter: { readonly name: string; readonly group: string }, groups: Groups): Group {
  const group = groups.get(parameter.group)
  assert(group, `parameter '${parameter.name}' is in no group`)
  return group
}
