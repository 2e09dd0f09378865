import { ConfigError, type Environment, type Flags, readArguments } from '../config.js'
import { type PresetFile, readPresetFiles } from '../store/presets.js'
import { tableLines } from '../text-table.js'

const HELP = `muond presets [NAME] [--presets DIR]

Lists the recipes that a group of \`open\` may name as its \`preset\`, or prints
the file of one, with the source of every value.

  --presets DIR  Folder with presets of your own; also MUOND_PRESETS
  --help         Prints this`

/** `muond presets`: returns the text to print. Throws ConfigError for an unknown name or flag and a bad preset. */
export function presetsCommand(argv: readonly string[], env: Environment): string {
  const { values, positionals } = readArguments(argv, { presets: 'string', help: 'boolean' })
  if (values.help) return HELP
  const files = readPresetFiles(presetsFolder(values, env))
  const [name, ...more] = positionals
  if (more.length > 0) throw new ConfigError(`presets takes one name, got ${positionals.join(' ')}`)
  return name === undefined ? list(files) : textOf(files, name)
}

/** The folder of the person's own presets by --presets or MUOND_PRESETS; the flag wins, '' is none. */
export function presetsFolder({ presets }: Flags, { MUOND_PRESETS }: Environment): string {
  return String(presets ?? MUOND_PRESETS ?? '')
}

function list(files: readonly PresetFile[]): string {
  const rows = files.map(({ preset: { name, algorithm, description } }) => [name, algorithm, description])
  return tableLines({ head: ['preset', 'algorithm', 'description'], align: ['left', 'left', 'left'], rows }).join('\n')
}

function textOf(files: readonly PresetFile[], name: string): string {
  const found = files.find(({ preset }) => preset.name === name)
  if (found) return found.text.trimEnd()
  const known = files.map(({ preset }) => preset.name).join(', ')
  throw new ConfigError(`there is no preset '${name}', expected one of ${known}`)
}
