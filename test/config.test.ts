import fc from 'fast-check'
import t from 'tap'
import {
  type Config,
  ConfigError,
  configOf,
  readCommand,
  SETTINGS,
  type SettingName,
  unknownVariables,
  VERSION,
} from '../src/config.js'

function configFrom(argv: string[], env: Record<string, string> = {}): Config {
  const command = readCommand(argv, env)
  if (command.kind === 'serve') return command.config
  throw new Error(`expected a config, got ${command.text}`)
}

t.test('without flags and variables every setting has its default', async (t) => {
  const config = configFrom([])
  for (const [name, setting] of Object.entries(SETTINGS)) {
    t.same(config[name as SettingName], 'list' in setting ? [] : setting.default, name)
  }
  t.ok(Object.isFrozen(config))
  t.ok(Object.isFrozen(config.api_keys))
})

t.test('flags win over variables, variables over defaults, and an empty variable is absent', async (t) => {
  const config = configFrom(['--port', '1', '--chunk-bytes=2'], { MUOND_PORT: '5', MUOND_LANES: '3', MUOND_HOST: '' })
  t.match(config, { port: 1, chunk_bytes: 2, lanes: 3, host: '127.0.0.1' })
})

t.test('key lists are split at commas', async (t) => {
  t.match(configFrom([], { MUOND_API_KEYS: 'one,two', MUOND_READ_KEYS: 'r' }), {
    api_keys: ['one', 'two'],
    read_keys: ['r'],
  })
})

t.test('a setting that is wrong is one line with its source, what it must be, and the value', async (t) => {
  const cases: [string[], Record<string, string>, string][] = [
    [['--port', 'abc'], {}, "--port: must be integer, got 'abc'"],
    [['--port', '65536'], {}, "--port: must be <= 65535, got '65536'"],
    [['--port', '1.5'], {}, "--port: must be integer, got '1.5'"],
    [[], { MUOND_PORT: 'x' }, "MUOND_PORT: must be integer, got 'x'"],
    [['--host', ''], {}, "--host: must NOT have fewer than 1 characters, got ''"],
    [['--device', 'gpu'], {}, "--device: must be auto, cpu, cuda, cuda:N or cuda:N,N, got 'gpu'"],
    [['--chunk-bytes', '16777217'], {}, "--chunk-bytes: must be <= 16777216, got '16777217'"],
    [['--drain-seconds', 'NaN'], {}, "--drain-seconds: must be number, got 'NaN'"],
    [
      ['--log-level', 'loud'],
      {},
      "--log-level: must be one of fatal, error, warn, info, debug, trace, silent, got 'loud'",
    ],
    [['--colour', 'red'], {}, "Unknown option '--colour' (--help lists the flags)"],
    [['--port'], {}, "Option '--port <value>' argument missing (--help lists the flags)"],
    [['serve'], {}, "Unexpected argument 'serve' (--help lists the flags)"],
    [['--api-keys', 'k', '--read-keys', 'r,k'], {}, 'api_keys and read_keys share 1 key(s): a key has one role'],
  ]
  for (const [argv, env, message] of cases) t.throws(() => readCommand(argv, env), new ConfigError(message), message)
})

t.test('a list with an empty key is refused, and no key is printed', async (t) => {
  for (const list of [',', 'secret,', ',secret', 'secret,,other', 'secret key', ' ']) {
    const attempt = () => readCommand([], { MUOND_API_KEYS: list })
    t.throws(
      attempt,
      { message: /^MUOND_API_KEYS: must be comma-separated keys .* got another value$/ },
      JSON.stringify(list),
    )
  }
})

t.test('devices are auto, cpu, cuda and cuda with numbers', async (t) => {
  for (const device of ['auto', 'cpu', 'cuda', 'cuda:0', 'cuda:0,1']) t.equal(configOf({ device }).device, device)
  for (const device of ['', 'cuda:', 'cuda:0,', 'cuda:x', 'CPU', 'cpu '])
    t.throws(() => configOf({ device }), ConfigError, device)
})

t.test('configOf names the setting that is wrong', async (t) => {
  t.throws(() => configOf({ lanes: -1 }), new ConfigError("setting lanes: must be >= 0, got '-1'"))
})

t.test('any integer within its range is taken as it is, any other is refused', async () => {
  const property = fc.property(fc.maxSafeInteger(), (value) => {
    const fits = value >= 0 && value <= 65535
    try {
      return configOf({ port: value }).port === value && fits
    } catch (error) {
      return error instanceof ConfigError && !fits
    }
  })
  fc.assert(property, { seed: 1, examples: [[0], [65535], [65536], [-1]] })
})

t.test('the help lists every setting with its flag, variable, default and sentence', async (t) => {
  const command = readCommand(['--help'], { MUOND_PORT: 'not looked at' })
  const lines = command.kind === 'print' ? command.text.split('\n') : []
  for (const [name, setting] of Object.entries(SETTINGS)) {
    const flag = `--${name.replaceAll('_', '-')}`
    const line = lines.find((line) => line.startsWith(`${flag} `)) ?? ''
    for (const part of [`MUOND_${name.toUpperCase()} `, String(setting.default), setting.description])
      t.ok(line.includes(part), `${flag}: ${part}`)
  }
  t.match(readCommand(['-h'], {}), { kind: 'print' })
})

t.test('--version prints the version of the package', async (t) => {
  t.same(readCommand(['--version'], {}), { kind: 'print', text: VERSION })
  t.match(VERSION, /^\d+\.\d+\.\d+/)
})

t.test('variables that name no setting are told', async (t) => {
  t.same(unknownVariables({ MUOND_PORT: '1', MUOND_PROT: '2', PATH: '3' }), ['MUOND_PROT'])
})
