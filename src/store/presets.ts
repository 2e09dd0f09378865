import { readdirSync, readFileSync } from 'node:fs'
import { basename, join, parse as parsePath } from 'node:path'
import { fileURLToPath } from 'node:url'
import { ConfigError } from '../config.js'
import { errorText } from '../errors.js'
import { type Preset, type Presets, parsePreset } from '../optimizer/preset.js'
import { parseYaml } from '../yaml.js'

/** A preset, its file, and the file's text. */
export type PresetFile = { readonly preset: Preset; readonly file: string; readonly text: string }

/** The folder of the presets that come with muond, beside package.json. */
const SHIPPED = fileURLToPath(new URL('../../../presets/', import.meta.url))

/** Those files do not change while a process runs: they are read once. */
let shipped: readonly PresetFile[] | undefined

/**
 * Names that are taken for presets, and refused unless they are as FILE. Hidden files are an editor's or a file
 * system's.
 */
const LOOKS_LIKE_ONE = /^[^.].*\.(yaml|yml|json)$/i
const FILE = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.(yaml|yml|json)$/
const NAMES = "1 to 128 letters, digits, '.', '_' and '-', a letter or digit first, then .yaml, .yml or .json"

/** The presets that come with muond and those in `folder`, if it is not '', by name. Throws as `readPresetFiles`. */
export function readPresets(folder = ''): Presets {
  return new Map(readPresetFiles(folder).map(({ preset }) => [preset.name, preset]))
}

/**
 * The presets of `readPresets` with their files. A preset has the name of its file; other files than YAML and JSON
 * are left alone.
 * Throws ConfigError with one line that names the file and the key; also for two presets of one name and a bad file
 * name.
 */
export function readPresetFiles(folder = ''): PresetFile[] {
  shipped ??= readFolder(SHIPPED)
  const read = [...shipped, ...(folder ? readFolder(folder) : [])]
  for (const [index, { preset, file }] of read.entries()) {
    const twin = read.findIndex((other) => other.preset.name === preset.name)
    if (twin !== index) throw new ConfigError(`${file}: there is a preset '${preset.name}' already, ${read[twin].file}`)
  }
  return read
}

function readFolder(folder: string): PresetFile[] {
  const files = listFolder(folder)
  for (const file of files) {
    if (!FILE.test(basename(file))) throw new ConfigError(`${file}: expected a name of ${NAMES}`)
  }
  return files.map(readPresetFile)
}

function listFolder(folder: string): string[] {
  try {
    const names = readdirSync(folder).filter((name) => LOOKS_LIKE_ONE.test(name))
    return names.sort().map((name) => join(folder, name))
  } catch (error) {
    throw new ConfigError(`presets folder '${folder}' cannot be read: ${errorText(error)}`)
  }
}

function readPresetFile(file: string): PresetFile {
  try {
    const text = readFileSync(file, 'utf8')
    return { preset: parsePreset(parsePath(file).name, parseYaml(text)), file, text }
  } catch (error) {
    throw new ConfigError(`${file}: ${errorText(error)}`)
  }
}
