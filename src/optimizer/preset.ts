import { ServiceError } from '../errors.js'
import type { GroupDeclaration } from '../wire/frame.js'
import { type Group, parseGroup, show } from './hyperparameters.js'

/**
 * A value of a recipe and its source, such as a paper; `confirmed` unless the source does not state the value
 * outright.
 */
export type PresetValue = { readonly value: unknown; readonly source: string; readonly confirmed: boolean }

/** The values of a recipe by hyperparameter. */
export type Recipe = Readonly<Record<string, PresetValue>>

/** A published recipe: its values for each algorithm; `algorithm` is the one of a group that names none. */
export type Preset = {
  readonly name: string
  readonly description: string
  readonly source: string
  readonly algorithm: string
  readonly recipes: Readonly<Record<string, Recipe>>
}

export type Presets = ReadonlyMap<string, Preset>

/**
 * Completes a declared group with its preset, if it names one, and then as `parseGroup` does. A key that the group
 * gives itself wins over the preset's.
 * Throws HYPERPARAMETER_INVALID for an unknown preset or one without the group's algorithm, and as `parseGroup`.
 */
export function parsePresetGroup({ preset: asked, ...given }: GroupDeclaration, presets: Presets): Group {
  if (asked === undefined) return parseGroup(given)
  const preset = presets.get(asked)
  if (preset === undefined) {
    throw refusal(
      `group ${show(given.name)}: preset is ${show(asked)}, expected one of ${[...presets.keys()].join(', ')}`,
    )
  }
  const { algorithm = preset.algorithm } = given
  if (!Object.hasOwn(preset.recipes, algorithm)) {
    const known = Object.keys(preset.recipes).join(', ')
    throw refusal(
      `group ${show(given.name)}: preset ${show(asked)} has no values for ${show(algorithm)}, only for ${known}`,
    )
  }
  return { ...parseGroup({ ...besideThese(preset.recipes[algorithm], given), ...given, algorithm }), preset: asked }
}

/** A preset's values under those of a group. Coefficients of the group's own bring their own ns_steps. */
function besideThese(recipe: Recipe, given: object): Readonly<Record<string, unknown>> {
  const { ns_steps, ...values } = valuesOf(recipe)
  return ns_steps === undefined || 'ns_coefficients' in given ? values : { ...values, ns_steps }
}

/** The bare values of a recipe. */
export function valuesOf(recipe: Recipe): Readonly<Record<string, unknown>> {
  return Object.fromEntries(Object.entries(recipe).map(([key, { value }]) => [key, value]))
}

const KEYS = ['description', 'source', 'algorithm', 'hyperparameters']
const VALUE_KEYS = ['value', 'source', 'confirmed']

/**
 * Reads a preset from its file, parsed as YAML or JSON, with the checks that a group of `open` gets. A hyperparameter
 * is its bare value, or a map of `value`, `source` and `confirmed`. Throws HYPERPARAMETER_INVALID with the key.
 */
export function parsePreset(name: string, document: unknown): Preset {
  const file = mapOf('the file', document)
  checkKeys(file, KEYS, '')
  const preset = {
    name,
    description: textOf(file, 'description', ''),
    source: textOf({ source: '', ...file }, 'source', ''),
    algorithm: textOf(file, 'algorithm', ''),
    recipes: recipesOf(mapOf('hyperparameters', file.hyperparameters)),
  }
  const { algorithm, recipes } = preset
  if (Object.hasOwn(recipes, algorithm)) return preset
  throw refusal(`algorithm is ${show(algorithm)}, expected one of hyperparameters: ${Object.keys(recipes).join(', ')}`)
}

function recipesOf(algorithms: Readonly<Record<string, unknown>>): Preset['recipes'] {
  const entries = Object.entries(algorithms).map(([algorithm, given]) => {
    const path = `hyperparameters.${algorithm}`
    const values = Object.entries(mapOf(path, given)).map(
      ([key, value]) => [key, presetValue(`${path}.${key}`, value)] as const,
    )
    const recipe = Object.fromEntries(values)
    checkRecipe(algorithm, recipe)
    return [algorithm, recipe]
  })
  return Object.fromEntries(entries)
}

/** Reads a value in its short or long form. No hyperparameter is a map, so a map is the long form. */
function presetValue(path: string, given: unknown): PresetValue {
  if (!isMap(given)) return { value: given, source: '', confirmed: true }
  checkKeys(given, VALUE_KEYS, `${path}.`)
  const { value, source = '', confirmed = true } = given
  if (value === undefined) throw refusal(`${path}.value is missing`)
  if (typeof confirmed !== 'boolean') throw refusal(`${path}.confirmed is ${show(confirmed)}, expected true or false`)
  return { value, source: textOf({ source }, 'source', `${path}.`), confirmed }
}

function checkRecipe(algorithm: string, recipe: Recipe): void {
  const reserved = ['name', 'algorithm', 'preset'].find((key) => Object.hasOwn(recipe, key))
  if (reserved !== undefined) throw refusal(`hyperparameters.${algorithm}.${reserved} is no hyperparameter`)
  try {
    parseGroup({ ...valuesOf(recipe), name: 'preset', algorithm })
  } catch (error) {
    const message = String(error).replace(/^.*?group 'preset': /, '')
    throw refusal(`hyperparameters.${algorithm}: ${message}`)
  }
}

function checkKeys(map: Readonly<Record<string, unknown>>, known: readonly string[], path: string): void {
  const key = Object.keys(map).find((candidate) => !known.includes(candidate))
  if (key !== undefined) throw refusal(`${path}${key} is unknown, expected ${known.join(', ')}`)
}

function mapOf(what: string, value: unknown): Readonly<Record<string, unknown>> {
  if (isMap(value)) return value
  throw refusal(value === undefined ? `${what} is missing` : `${what} is ${show(value)}, expected a map`)
}

function isMap(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function textOf(map: Readonly<Record<string, unknown>>, key: string, path: string): string {
  const value = map[key]
  if (typeof value === 'string') return value
  throw refusal(value === undefined ? `${path}${key} is missing` : `${path}${key} is ${show(value)}, expected a text`)
}

function refusal(message: string): ServiceError {
  return new ServiceError('HYPERPARAMETER_INVALID', message)
}
