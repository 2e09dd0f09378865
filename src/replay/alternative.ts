import { readFile } from 'node:fs/promises'
import { ConfigError } from '../config.js'
import { errorText } from '../errors.js'
import { type Groups, groupOf, show, stateBearing, updateGroup } from '../optimizer/hyperparameters.js'
import { describe, type Parameter, parseParameters } from '../optimizer/parameter.js'
import type { Presets } from '../optimizer/preset.js'
import { type Declaration, parseGroups } from '../run/declaration.js'
import type { GroupDeclaration, ParameterDeclaration } from '../wire/frame.js'
import { parseYaml } from '../yaml.js'

/** Other groups for some of a run's parameters. */
export type Alternative = {
  /** Those parameters in their new groups; there are no attentions, as row scales are the same. */
  readonly declaration: Declaration
  /** The index in the run of each of them. */
  readonly indices: readonly number[]
  /** Those whose state means the same to both groups: they begin with what the checkpoint has, all others with none. */
  readonly keeps: readonly boolean[]
  /** The groups whose learning rate follows that of the run, each with the group of the run that it follows. */
  readonly follows: ReadonlyMap<string, string>
}

/** A group of the file; beside the keys of `open` it may say which parameters it takes, and whose schedule it has. */
type Given = { readonly declared: GroupDeclaration; readonly patterns: readonly string[]; readonly follows: boolean }

const MATRIX_ALGORITHMS = ['muon', 'muonclip']

/** As `parseAlternative`, from a file of YAML or JSON; every refusal is a ConfigError that names the file. */
export async function readAlternative(file: string, run: Declaration, presets: Presets): Promise<Alternative> {
  try {
    return parseAlternative(parseYaml(await readFile(file, 'utf8')), run, presets)
  } catch (error) {
    throw new ConfigError(`${file}: ${errorText(error)}`)
  }
}

/**
 * Reads other groups for a run: a list of groups as `open` has them, or a map with the key `groups`. A group takes the
 * parameters that a pattern of its `parameters` matches, or, without that key, those of the run's group of its name.
 * Throws ConfigError for what matches nothing or twice, and ServiceError as `open` does.
 */
export function parseAlternative(document: unknown, run: Declaration, presets: Presets): Alternative {
  const given = givenGroups(document).map(givenGroup)
  const groups = parseGroups(
    given.map(({ declared }) => declared),
    presets,
  )
  const taken = new Map<Parameter, string>()
  for (const one of given) take(one, run, taken)
  const parameters = run.parameters.filter((parameter) => taken.has(parameter))
  const declared = parameters.map((parameter) => redeclared(parameter, String(taken.get(parameter)), groups))
  const moved = parseParameters(declared, groups)
  return {
    declaration: { groups, parameters: moved, attentions: [] },
    indices: parameters.map(({ index }) => index),
    keeps: parameters.map((parameter, i) => {
      return stateBearing(groupOf(parameter, run.groups), groupOf(moved[i], groups)) === undefined
    }),
    follows: new Map(
      given
        .filter(({ follows }) => follows)
        .map(({ declared: { name } }) => [name, followed(name, parameters, taken)] as const),
    ),
  }
}

/** The groups of a step: a learning rate that follows the run's is `lr` times the run's over its largest one. */
export function groupsAt(
  { declaration: { groups }, follows }: Alternative,
  run: Groups,
  largest: ReadonlyMap<string, number>,
): Groups {
  if (follows.size === 0) return groups
  const at = new Map(groups)
  for (const [name, other] of follows) {
    const group = groups.get(name)
    const lr = run.get(other)?.hyperparameters.lr
    const most = largest.get(other)
    /* c8 ignore next -- the run has the groups that are followed */
    if (!group || lr === undefined || most === undefined) continue
    const share = most === 0 ? 0 : lr / most
    at.set(name, updateGroup(group, { lr: group.hyperparameters.lr * share }))
  }
  return at
}

function givenGroups(document: unknown): readonly unknown[] {
  const list = isMap(document) ? document.groups : document
  if (!Array.isArray(list)) throw new ConfigError(`groups is ${show(list)}, expected a list`)
  if (list.length === 0) throw new ConfigError('groups is empty, expected at least one')
  return list
}

function givenGroup(raw: unknown): Given {
  if (!isMap(raw) || typeof raw.name !== 'string')
    throw new ConfigError(`a group is ${show(raw)}, expected a map with a name`)
  const { name, parameters, lr_schedule = 'constant', algorithm, preset, ...hyperparameters } = raw
  const where = `group ${show(name)}`
  if (!isTexts(parameters))
    throw new ConfigError(`${where}: parameters is ${show(parameters)}, expected a list of names or patterns`)
  if (lr_schedule !== 'constant' && lr_schedule !== 'run')
    throw new ConfigError(`${where}: lr_schedule is ${show(lr_schedule)}, expected constant or run`)
  const declared = { ...hyperparameters, name, ...textKey({ algorithm }, where), ...textKey({ preset }, where) }
  return { declared, patterns: parameters ?? [], follows: lr_schedule === 'run' }
}

function textKey(given: Readonly<Record<string, unknown>>, where: string): Readonly<Record<string, string>> {
  const [[key, value]] = Object.entries(given)
  if (value === undefined) return {}
  if (typeof value === 'string') return { [key]: value }
  throw new ConfigError(`${where}: ${key} is ${show(value)}, expected a text`)
}

function take({ declared: { name }, patterns }: Given, run: Declaration, taken: Map<Parameter, string>): void {
  for (const parameter of matched(name, patterns, run)) {
    const other = taken.get(parameter)
    if (other !== undefined)
      throw new ConfigError(`parameter '${parameter.name}' is taken by group '${other}' and by group '${name}'`)
    taken.set(parameter, name)
  }
}

function matched(name: string, patterns: readonly string[], { groups, parameters }: Declaration): Parameter[] {
  if (patterns.length === 0) {
    const own = parameters.filter(({ group }) => group === name)
    if (own.length > 0) return own
    const known = [...groups.keys()].join(', ')
    throw new ConfigError(`the run has no parameters in a group '${name}': call it ${known}, or give it parameters`)
  }
  const tests = patterns.map((pattern) => ({ pattern, expression: expressionOf(pattern) }))
  const idle = tests.find(({ expression }) => !parameters.some((parameter) => expression.test(parameter.name)))
  if (idle) throw new ConfigError(`group '${name}': no parameter of the run matches ${show(idle.pattern)}`)
  return parameters.filter((parameter) => tests.some(({ expression }) => expression.test(parameter.name)))
}

/** `*` is any number of characters, all else is itself. */
function expressionOf(pattern: string): RegExp {
  const parts = pattern.split('*').map((part) => part.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&'))
  return new RegExp(`^${parts.join('.*')}$`, 's')
}

/** A parameter in another group. How it is cut into matrices is nothing that an elementwise algorithm may be told. */
function redeclared(parameter: Parameter, group: string, groups: Groups): ParameterDeclaration {
  const { index: _, split, heads, matrices, ...rest } = describe(parameter)
  const { algorithm } = groupOf({ ...parameter, group }, groups)
  const layout = { ...(split && { split }), ...(heads && { heads }), ...(matrices && { matrices }) }
  return { ...rest, group, ...(MATRIX_ALGORITHMS.includes(algorithm) && layout) }
}

/** The group of the run whose learning rate a group follows: all its parameters are of that one. */
function followed(name: string, parameters: readonly Parameter[], taken: ReadonlyMap<Parameter, string>): string {
  const own = parameters.filter((parameter) => taken.get(parameter) === name)
  const [first, ...others] = new Set(own.map(({ group }) => group))
  if (others.length === 0) return first
  const message = `its parameters are of the run's groups ${[first, ...others].join(', ')}: which of them is followed?`
  throw new ConfigError(`group '${name}': lr_schedule is run, and ${message}`)
}

function isMap(value: unknown): value is Readonly<Record<string, unknown>> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isTexts(value: unknown): value is readonly string[] | undefined {
  if (value === undefined) return true
  return Array.isArray(value) && value.length > 0 && value.every((one) => typeof one === 'string')
}
