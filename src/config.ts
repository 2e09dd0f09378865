import { readFileSync } from 'node:fs'
import { envSchema } from 'env-schema'
import { type Flags, type FlagTypes, scanArguments } from './arguments.js'
import { contradictionsIn } from './contradictions.js'
import { errorText } from './errors.js'
import { flag, integer, key, keys, list, type Setting, seconds, text } from './setting.js'

export type { Flags } from './arguments.js'

const LOG_LEVELS = ['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent'] as const
const DURABILITIES = ['checkpoint', 'journal'] as const
const DEVICE = { pattern: '^(auto|cpu|cuda(:\\d+(,\\d+)*)?)$', expected: 'be auto, cpu, cuda, cuda:N or cuda:N,N' }
const BYTES = Number.MAX_SAFE_INTEGER
const DAY = 86_400

/**
 * Every setting of the service: type, default, range and one sentence. A setting `chunk_bytes` is the flag
 * `--chunk-bytes` and the variable `MUOND_CHUNK_BYTES`; the flag wins, and an empty variable counts as absent.
 */
export const SETTINGS = {
  host: text('127.0.0.1', 'Address to listen on.', { minLength: 1 }),
  insecure_no_keys: flag('Listen beyond the loopback without keys: whoever reaches the service may do everything.'),
  insecure_no_tls: flag(
    'Listen beyond the loopback without TLS: whoever is on the way reads keys and gradients; for a proxy that has TLS.',
  ),
  allowed_hosts: list(
    'Comma-separated names and addresses, without port, that a request may have as its Host, beside loopback names and the address that it came to; * is any.',
  ),
  allowed_origins: list(
    'Comma-separated origins, such as https://board.example, of web pages that may use the service, beside its own; * is any.',
  ),
  port: integer(8787, [0, 65_535], 'Port to listen on; 0 picks a free one.'),
  socket: text('', 'Path of a Unix socket to listen on as well, which only the user of the service may connect to.'),
  device: text('auto', 'Where steps are computed: auto, cpu, cuda, cuda:0 or cuda:0,1.', DEVICE),
  data: text(
    '',
    'Folder for checkpoints and journals, or s3://BUCKET/PREFIX; without one, state ends with the process.',
  ),
  data_wait_seconds: seconds(0, [0, DAY], 'How long a start waits for another service that has the data folder.'),
  s3_endpoint: text('', 'URL of the store of an s3:// data, where that is not AWS.'),
  s3_region: text('', 'Region of an s3:// data; empty is what AWS_REGION or the profile says.'),
  s3_path_style: flag(
    'Ask for ENDPOINT/BUCKET/KEY and not for BUCKET.ENDPOINT/KEY, as most stores want that are not AWS.',
  ),
  s3_lease_seconds: seconds(
    15,
    [0.1, DAY],
    'A service whose s3:// data shows no sign of life for so long is taken to be dead by the next one.',
  ),
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
  keep_journal: flag('Keep journals as far back as the oldest checkpoint that is kept: for muond replay.'),
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
  max_bytes_per_second: integer(
    0,
    [0, BYTES],
    'Bytes of gradients, on whatever transport, and of state read or imported over REST, that all together may move; what is faster waits. 0 is without a limit.',
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
  keys_file: text('', 'File of keys with their scopes and runs, which muond keys writes; read again on SIGHUP.'),
  api_keys: keys('Comma-separated keys that may do everything; without any key here or in the file all may.'),
  tls_cert: text(
    '',
    'File with the certificate chain of the service, PEM; with it TLS is spoken. Read again on SIGHUP.',
  ),
  tls_key: text('', 'File with the private key of tls_cert, PEM.'),
  tls_client_ca: text('', 'File with the authorities, PEM, of which each client must have a certificate (mutual TLS).'),
  max_refusals_per_minute: integer(
    60,
    [1, 1_000_000],
    'Refused keys and refused upgrades of one address; beyond it the address is told to wait. The right key always passes.',
  ),
  peers: list(
    'Comma-separated URLs of all processes that runs may be spread over, the same list in each: http://10.0.0.2:8787,http://10.0.0.3:8787.',
  ),
  advertise: text('', 'The URL among peers that is this process.'),
  shards: integer(
    1,
    [1, 256],
    'With peers: over so many shards a new run is spread whose client leaves the number to the service.',
  ),
  cluster_key: key('The key that the processes of peers show each other; the same in each, and for nobody else.'),
  cluster_key_file: text('', 'File with that key, instead of the variable.'),
  run_metrics: flag('Series of their own in /metrics for each run in memory, with its name as a label.'),
  log_level: text('info', 'Least severe events to log.', {
    enum: LOG_LEVELS,
    expected: `be one of ${LOG_LEVELS.join(', ')}`,
  }),
} as const satisfies Record<string, Setting>

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

/** What is wrong with a command, a line for each problem, meant for the person who typed it. */
export class ConfigError extends Error {
  override readonly name = 'ConfigError'

  /** All problems in one error: whoever has mended the first one should not meet the second one then. */
  static of(problems: readonly string[]): ConfigError {
    return new ConfigError(problems.join('\n'))
  }
}

type Source = { value: string | number | boolean; from: string }
type Sources = Partial<Record<SettingName, Source>>

const NAMES = Object.keys(SETTINGS).filter(isSettingName)
const manifest: { version: string } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8'))

/** The version of this package. */
export const VERSION = manifest.version

/** Reads flags and `MUOND_*` variables. Throws ConfigError with a line for each unknown flag and bad value. */
export function readCommand(argv: readonly string[], env: Environment): Command {
  const { values: flags, problems } = readFlags(argv)
  if (flags.help) return { kind: 'print', text: helpText() }
  if (flags.version) return { kind: 'print', text: VERSION }
  return { kind: 'serve', config: check({ ...fromVariables(env), ...fromFlags(flags) }, problems) }
}

/**
 * What a command line and the variables come to, right or wrong. `config` has the default of each setting in `wrong`;
 * `given` are flags and variables that settings were taken from; `problems` has a line for all that is wrong.
 */
export type Examined = {
  readonly config: Config
  readonly given: readonly string[]
  readonly wrong: ReadonlySet<SettingName>
  readonly problems: readonly string[]
}

/** Reads flags and `MUOND_*` variables as `readCommand` does, and flags of a command's own. Throws nothing. */
export function examine(
  argv: readonly string[],
  env: Environment,
  own: FlagTypes,
): Examined & { readonly flags: Flags } {
  const { values: flags, problems } = readFlags(argv, own)
  return { ...examined({ ...fromVariables(env), ...fromFlags(flags) }, problems), flags }
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

/** The variable that commands which ask a service, and clients, take their key from. */
const TOKEN_VARIABLE = 'MUOND_TOKEN'

/** The `MUOND_*` variables that nothing reads, so that a misspelt one is not ignored in silence. */
export function unknownVariables(env: Environment): string[] {
  const known = new Set([...NAMES.map(variableOf), TOKEN_VARIABLE])
  return Object.keys(env).filter((name) => name.startsWith('MUOND_') && !known.has(name))
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

function readFlags(argv: readonly string[], own: FlagTypes = {}): { values: Flags; problems: string[] } {
  const secrets = NAMES.filter(isSecret).map(flagOf)
  const types = NAMES.map((name) => [flagOf(name), SETTINGS[name].type === 'boolean' ? 'boolean' : 'string'] as const)
  const read = scanArguments(argv, { ...Object.fromEntries(types), help: 'boolean', version: 'boolean', ...own })
  const given = secrets.filter((flag) => argv.some((word) => word.split('=')[0] === `--${flag}`)).map(secretRefusal)
  const problems = [...read.problems, ...given]
  // What follows a flag that nobody knows may be its value, and a secret.
  const words = problems.length > 0 ? [] : read.positionals
  const unexpected = words.map((word) => `Unexpected argument '${word}' (--help lists the flags)`)
  return { values: read.values, problems: [...problems, ...unexpected] }
}

function secretRefusal(flag: string): string {
  const variable = `MUOND_${flag.replaceAll('-', '_').toUpperCase()}`
  const file = flag === 'cluster-key' ? '--cluster-key-file' : '--keys-file'
  return `there is no --${flag}, as everybody can read command lines: use ${variable} or ${file}`
}

/**
 * Splits the arguments of a command into its flags and the rest; `-h` is `--help`. Throws ConfigError with a line for
 * each problem.
 */
export function readArguments(
  argv: readonly string[],
  flags: FlagTypes,
): { values: Flags; positionals: readonly string[] } {
  const { problems, ...read } = scanArguments(argv, flags)
  if (problems.length > 0) throw ConfigError.of(problems)
  return read
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

function check(sources: Sources, before: readonly string[] = []): Config {
  const { config, problems } = examined(sources, before)
  if (problems.length > 0) throw ConfigError.of(problems)
  return config
}

function examined(sources: Sources, before: readonly string[]): Examined {
  const problems = [...before]
  const wrong = new Set<SettingName>()
  const given = (name: SettingName) => {
    try {
      return settingValue(name, sources[name])
    } catch (error) {
      problems.push(errorText(error))
      wrong.add(name)
      return settingValue(name, undefined)
    }
  }
  const entries = NAMES.map((name) => [name, given(name)])
  const config: Config = Object.freeze(Object.fromEntries(entries))
  problems.push(...contradictionsIn(config))
  return { config, given: Object.values(sources).map(({ from }) => from), wrong, problems }
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
  'muond check [--flag value]…     what a start with these settings would meet; changes nothing',
  'muond status [URL]              what a service does, and how full it is',
  'muond top [URL]                 the runs of a service as they train',
  'muond keys add NAME --file FILE makes a key with scopes and runs; remove, list',
  'muond presets [NAME]            recipes that a group may name as its preset',
  'muond explain PARAMETERS.json   what a step of each parameter would be, and why',
  'muond export RUN --to FORMAT    the state of a run as a file for torch or as safetensors',
  'muond import RUN FILE --from X  a run goes on from the state of another optimizer',
  'muond replay RUN --data DIR     computes a journal again, as it was or with other optimizers',
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
