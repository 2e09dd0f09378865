import { readFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { envSchema } from 'env-schema'
import { errorText } from './errors.js'

const LOG_LEVELS = ['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'] as const
const DURABILITIES = ['checkpoint', 'journal'] as const
const DEVICE = { pattern: '^(auto|cpu|cuda(:\\d+(,\\d+)*)?)$', expected: 'be auto, cpu, cuda, cuda:N or cuda:N,N' }
const BYTES = Number.MAX_SAFE_INTEGER
const DAY = 86_400
const LIST_EXPECTED = 'be comma-separated, without spaces, none of them empty'
/** RFC 6750's token characters. */
const KEY = '[A-Za-z0-9._~+/=-]+'
const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|::1)$/i
const KEY_WORDS = 'letters, digits and . _ ~ + / = -'

/**
 * Every setting of the service: type, default, range and one sentence. A setting `chunk_bytes` is the flag
 * `--chunk-bytes` and the variable `MUOND_CHUNK_BYTES`; the flag wins, and an empty variable counts as absent.
 */
export const SETTINGS = {
  host: text('127.0.0.1', 'Address to listen on.', { minLength: 1 }),
  insecure: flag('Listen on another address than loopback without keys: whoever reaches it may do everything.'),
  allowed_hosts: list(
    'Comma-separated names and addresses, without port, that a request may have as its Host, beside loopback names and the address that it came to; * is any.',
  ),
  allowed_origins: list(
    'Comma-separated origins, such as https://board.example, of web pages that may use the service, beside its own; * is any.',
  ),
  port: integer(8787, [0, 65_535], 'Port to listen on; 0 picks a free one.'),
  socket: text('', 'Path of a Unix socket to listen on as well, which only the user of the service may connect to.'),
  device: text('auto', 'Where steps are computed: auto, cpu, cuda, cuda:0 or cuda:0,1.', DEVICE),
  data: text('', 'Folder for checkpoints and journals; without one, state ends with the process.'),
  data_wait_seconds: seconds(0, [0, DAY], 'How long a start waits for another service that has the data folder.'),
  durability: text(
    'checkpoint',
    'With data: a step is safe with the next checkpoint, or, with journal, before its receipt.',
    {
      enum: DURABILITIES,
      expected: `be one of ${DURABILITIES.join(', ')}`,
    },
  ),
  checkpoint_steps: integer(
    100,
    [0, BYTES],
    'Steps between two checkpoints; 0 takes them only when asked, and at shutdown.',
  ),
  checkpoints_kept: integer(3, [1, 1_000_000], 'Newest checkpoints kept of each run; those with a tag are kept too.'),
  checkpoint_file_bytes: integer(
    2 ** 32,
    [1, BYTES],
    'Most bytes of tensors in one file of a checkpoint; a larger tensor has its own.',
  ),
  journal_bytes: integer(2 ** 33, [2 ** 20, BYTES], 'A journal longer than this is ended by a checkpoint.'),
  presets: text('', 'Folder with presets of your own, as YAML or JSON files, beside those that come with muond.'),
  onnxruntime_dir: text(
    '',
    'Folder that holds libonnxruntime and its providers; empty is the one inside onnxruntime-node.',
  ),
  lanes: integer(0, [0, 256], 'Worker threads that compute side by side; 0 chooses by the device.'),
  threads: integer(0, [0, 1024], 'Threads inside one operation of a lane; 0 chooses by the device.'),
  staging_bytes: integer(
    3 * 2 ** 26,
    [2 ** 20, BYTES],
    'Arena that received gradients wait in; a larger gradient has memory of its run. Updates have one of twice the size.',
  ),
  chunk_bytes: integer(2 ** 22, [4, 2 ** 24], 'Largest `data` of one gradient or update frame.'),
  state_bytes_limit: integer(
    0,
    [0, BYTES],
    'Most bytes that all runs may take of each GPU, or of the memory; 0 is what the GPU has, or three quarters of the memory.',
  ),
  max_runs: integer(
    64,
    [1, 1_000_000],
    'Most runs in memory; with data one without a connection leaves for a new one, which else is refused.',
  ),
  max_connections: integer(256, [1, 1_000_000], 'Most streams at a time.'),
  max_sockets: integer(
    1024,
    [1, 1_000_000],
    'Most TCP connections at a time, streams among them; one more takes the place of that which has waited longest for a request.',
  ),
  unfinished_bytes: integer(
    2 ** 26,
    [2 ** 25, BYTES],
    'Room for messages of more than 64 KiB, over all streams; those that find none are not read until they do.',
  ),
  max_parameters: integer(100_000, [1, 10_000_000], 'Most parameters of one run.'),
  receipts_kept: integer(1000, [1, 1_000_000], 'Receipts kept per run, for REST and for event streams that reconnect.'),
  receipts_bytes: integer(
    2 ** 23,
    [1, BYTES],
    'Bytes that the kept receipts of a run may take; the newest one is always kept.',
  ),
  send_timeout_seconds: seconds(
    60,
    [0.001, DAY],
    'A stream that sends a gradient or has updates to read, and moves too little within so long, is closed; see min_bytes_per_second.',
  ),
  min_bytes_per_second: integer(
    2 ** 16,
    [1, BYTES],
    'Least rate, over send_timeout_seconds, of gradients and updates of a stream, and of bodies and answers of REST; what is slower is ended.',
  ),
  idle_seconds: seconds(
    DAY,
    [0, 1000 * DAY],
    'A run without a connection for so long leaves memory: with data the next open brings it back, without it ends; 0 is never.',
  ),
  open_timeout_seconds: seconds(
    30,
    [0.001, DAY],
    'A connection that has sent no request, or a stream that has opened no run, after so long is closed.',
  ),
  drain_seconds: seconds(30, [0, DAY], 'How long a shutdown waits for the steps in flight.'),
  api_keys: keys('Comma-separated bearer keys that may do everything; without any key the service is open to all.'),
  read_keys: keys('Comma-separated bearer keys that may only read.'),
  api_keys_file: text('', 'File with more api_keys: one a line.'),
  read_keys_file: text('', 'File with more read_keys: one a line.'),
  run_metrics: flag('Series of their own in /metrics for each run in memory, with its name as a label.'),
  log_level: text('info', 'Least severe events to log.', {
    enum: LOG_LEVELS,
    expected: `be one of ${LOG_LEVELS.join(', ')}`,
  }),
} as const satisfies Record<string, Setting>

/**
 * A JSON schema and three words of our own: `expected` says what a value must be where the schema cannot, `list`
 * splits it, and a `secret` has no flag, as command lines are read by all, and stays out of messages.
 */
type Setting = {
  type: 'string' | 'integer' | 'number' | 'boolean'
  default: string | number | boolean
  description: string
  expected?: string
  list?: true
  secret?: true
  [keyword: string]: unknown
}
export type SettingName = keyof typeof SETTINGS
type ValueOf<S> = S extends { list: true }
  ? readonly string[]
  : S extends { type: 'string' }
    ? string
    : S extends { type: 'boolean' }
      ? boolean
      : number

/** The settings of one process, frozen, by name; those that are lists of keys are arrays. */
export type Config = { readonly [Name in SettingName]: ValueOf<(typeof SETTINGS)[Name]> }

/** What a command line asks for: a service with `config`, or only a text (`--help`, `--version`). */
export type Command = { kind: 'serve'; config: Config } | { kind: 'print'; text: string }

/** A start-up error of one line, meant for the person who typed the command. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'
}

type Source = { value: string | number | boolean; from: string }
type Sources = Partial<Record<SettingName, Source>>

const NAMES = Object.keys(SETTINGS).filter(isSettingName)
const manifest: { version: string } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8'))

/** The version of this package. */
export const VERSION = manifest.version

/** Reads flags and `MUOND_*` variables. Throws ConfigError with one line for an unknown flag or a bad value. */
export function readCommand(argv: readonly string[], env: Environment): Command {
  const flags = readFlags(argv)
  if (flags.help) return { kind: 'print', text: helpText() }
  if (flags.version) return { kind: 'print', text: VERSION }
  return { kind: 'serve', config: check({ ...fromVariables(env), ...fromFlags(flags) }) }
}

/**
 * A config of the defaults and the given settings (lists comma separated), checked like flags. For tests and
 * embedding.
 */
export function configOf(settings: Partial<Record<SettingName, string | number | boolean>> = {}): Config {
  const sources: Sources = {}
  for (const name of NAMES) {
    const value = settings[name]
    if (value !== undefined) sources[name] = { value, from: `setting ${name}` }
  }
  return check(sources)
}

/** The `MUOND_*` variables that are no setting, so that a misspelt one is not ignored in silence. */
export function unknownVariables(env: Environment): string[] {
  const known = new Set(NAMES.map(variableOf))
  return Object.keys(env).filter((name) => name.startsWith('MUOND_') && !known.has(name))
}

function text(value: string, description: string, rest: { expected?: string; [keyword: string]: unknown } = {}) {
  return { type: 'string', default: value, description, ...rest } as const
}

function integer(value: number, [minimum, maximum]: [number, number], description: string) {
  return { type: 'integer', default: value, minimum, maximum, description } as const
}

function seconds(value: number, [minimum, maximum]: [number, number], description: string) {
  return { type: 'number', default: value, minimum, maximum, description } as const
}

function flag(description: string) {
  return { type: 'boolean', default: false, expected: 'be true or false', description } as const
}

/** No entry may be empty or have space around it: it would never be equal to anything. */
function list(description: string) {
  const pattern = '^([^,\\s]+(,[^,\\s]+)*)?$'
  return { type: 'string', default: '', list: true, pattern, expected: LIST_EXPECTED, description } as const
}

/** No entry may be empty: a stray comma must not open the service. */
function keys(description: string) {
  const pattern = `^(${KEY}(,${KEY})*)?$`
  const expected = `be comma-separated keys of ${KEY_WORDS}, none of them empty`
  return { type: 'string', default: '', list: true, secret: true, pattern, expected, description } as const
}

function isSettingName(name: string): name is SettingName {
  return Object.hasOwn(SETTINGS, name)
}

function isSecret(name: SettingName): boolean {
  return 'secret' in SETTINGS[name]
}

function flagOf(name: SettingName): string {
  return name.replaceAll('_', '-')
}

function variableOf(name: SettingName): string {
  return `MUOND_${name.toUpperCase()}`
}

/** The variables of a process. */
export type Environment = Readonly<Record<string, string | undefined>>

/** The flags of a command by name. `parseArgs` has lists for flags that may be given twice, which none is here. */
export type Flags = Readonly<Record<string, string | boolean | readonly (string | boolean)[] | undefined>>

function readFlags(argv: readonly string[]): Flags {
  refuseSecrets(argv)
  const settings = NAMES.filter((name) => !isSecret(name)).map(
    (name) => [flagOf(name), SETTINGS[name].type === 'boolean' ? 'boolean' : 'string'] as const,
  )
  const { values, positionals } = readArguments(argv, {
    ...Object.fromEntries(settings),
    help: 'boolean',
    version: 'boolean',
  })
  const [unexpected] = positionals
  if (unexpected === undefined) return values
  throw new ConfigError(`Unexpected argument '${unexpected}' (--help lists the flags)`)
}

function refuseSecrets(argv: readonly string[]): void {
  const name = NAMES.find((name) => isSecret(name) && argv.some((word) => word.split('=')[0] === `--${flagOf(name)}`))
  if (name === undefined) return
  const ways = `${variableOf(name)} or --${flagOf(name)}-file`
  throw new ConfigError(`there is no --${flagOf(name)}, as everybody can read command lines: use ${ways}`)
}

/**
 * Splits the arguments of a command into its flags and the rest; `-h` is `--help`. Throws ConfigError with one line.
 */
export function readArguments(
  argv: readonly string[],
  flags: Readonly<Record<string, 'string' | 'boolean'>>,
): { values: Flags; positionals: string[] } {
  const options = Object.entries(flags).map(([name, type]) => [name, name === 'help' ? { type, short: 'h' } : { type }])
  try {
    return parseArgs({ args: [...argv], strict: true, allowPositionals: true, options: Object.fromEntries(options) })
  } catch (error) {
    // parseArgs explains itself over several sentences; the first one names the flag.
    const [sentence] = String(error)
      .replace(/^TypeError \[\w+\]: /, '')
      .split(/\.\s|\n/)
    throw new ConfigError(`${sentence} (--help lists the flags)`)
  }
}

function fromFlags(flags: Flags): Sources {
  const sources: Sources = {}
  for (const name of NAMES) {
    const value = flags[flagOf(name)]
    if (typeof value === 'string' || value === true) sources[name] = { value, from: `--${flagOf(name)}` }
  }
  return sources
}

function fromVariables(env: Environment): Sources {
  const sources: Sources = {}
  for (const name of NAMES) {
    const value = env[variableOf(name)]
    if (value) sources[name] = { value, from: variableOf(name) }
  }
  return sources
}

function check(sources: Sources): Config {
  const entries = NAMES.map((name) => [name, settingValue(name, sources[name])])
  const given: Config = Object.fromEntries(entries)
  const config = Object.freeze({
    ...given,
    api_keys: withFile(given.api_keys, given.api_keys_file),
    read_keys: withFile(given.read_keys, given.read_keys_file),
  })
  const shared = config.api_keys.filter((key) => config.read_keys.includes(key))
  if (shared.length > 0)
    throw new ConfigError(`api_keys and read_keys share ${shared.length} key(s): a key has one role`)
  refuseOpenToAll(config)
  return config
}

/** Without keys only this machine may come. */
function refuseOpenToAll({ host, insecure, api_keys, read_keys }: Config): void {
  if (insecure || LOOPBACK.test(host) || api_keys.length + read_keys.length > 0) return
  throw new ConfigError(
    `host is '${host}' and there are no keys: whoever reaches it could do everything. Set MUOND_API_KEYS or --api-keys-file, or --insecure`,
  )
}

function withFile(keys: readonly string[], path: string): readonly string[] {
  return Object.freeze(path === '' ? [...keys] : [...keys, ...keysOfFile(path)])
}

/** A key a line; empty lines are none. A file without a key is refused: it must not open the service. */
function keysOfFile(path: string): string[] {
  const lines = readLines(path).map((line) => line.trim())
  const wrong = lines.findIndex((line) => line !== '' && !new RegExp(`^${KEY}$`).test(line))
  if (wrong >= 0) throw new ConfigError(`line ${wrong + 1} of key file '${path}' is no key of ${KEY_WORDS}`)
  const keys = lines.filter((line) => line !== '')
  if (keys.length === 0) throw new ConfigError(`key file '${path}' has no key`)
  return keys
}

function readLines(path: string): string[] {
  try {
    return readFileSync(path, 'utf8').split('\n')
  } catch (error) {
    throw new ConfigError(`key file '${path}' cannot be read: ${errorText(error)}`)
  }
}

function settingValue(name: SettingName, source: Source | undefined): unknown {
  const value = source === undefined ? SETTINGS[name].default : parse(name, source)
  return 'list' in SETTINGS[name] ? entriesOf(value) : value
}

function parse(name: SettingName, source: Source): unknown {
  const { list, secret, expected, ...schema }: Setting = SETTINGS[name]
  try {
    const properties = { [name]: schema }
    return envSchema({ schema: { type: 'object', properties }, data: { [name]: source.value }, env: false })[name]
  } catch (error) {
    const requirement = expected ?? String(error).replace(/^.*? env\/\w+ must /, '')
    throw new ConfigError(`${source.from}: must ${requirement}, got ${secret ? 'another value' : `'${source.value}'`}`)
  }
}

function entriesOf(value: unknown): readonly string[] {
  return Object.freeze(String(value).split(',').filter(Boolean))
}

const USAGE = [
  'muond [serve] [--flag value]…   serves; --help and --version print and exit',
  'muond presets [NAME]            recipes that a group may name as its preset',
  'muond explain PARAMETERS.json   what a step of each parameter would be, and why',
  'muond export RUN --to FORMAT    the state of a run as a file for torch or as safetensors',
  'muond import RUN FILE --from X  a run goes on from the state of another optimizer',
] as const

function helpText(): string {
  const rows = NAMES.map((name) => {
    const { default: value, description } = SETTINGS[name]
    return {
      flag: isSecret(name) ? '' : `--${flagOf(name)}`,
      variable: variableOf(name),
      value: shown(value),
      meaning: description,
    }
  })
  const all = [{ flag: 'flag', variable: 'variable', value: 'default', meaning: 'meaning' }, ...rows]
  const width = (column: 'flag' | 'variable' | 'value') => Math.max(...all.map((row) => row[column].length))
  const [flags, variables, values] = [width('flag'), width('variable'), width('value')]
  const lines = all.map(({ flag, variable, value, meaning }) =>
    [flag.padEnd(flags), variable.padEnd(variables), value.padEnd(values), meaning].join('  '),
  )
  return [`muond ${VERSION}: the optimizer as a service`, '', ...USAGE, '', ...lines].join('\n')
}

function shown(value: string | number | boolean): string {
  return value === '' ? '(none)' : String(value)
}
