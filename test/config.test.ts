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
  const config = configFrom(['--port', '1', '--chunk-bytes=8'], { MUOND_PORT: '5', MUOND_LANES: '3', MUOND_HOST: '' })
  t.match(config, { port: 1, chunk_bytes: 8, lanes: 3, host: '127.0.0.1' })
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
    [[], { MUOND_API_KEYS: 'k', MUOND_READ_KEYS: 'r,k' }, 'api_keys and read_keys share 1 key(s): a key has one role'],
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

t.test('keys come from variables and files, and not from a command line, which everybody can read', async (t) => {
  const folder = t.testdir({ keys: 'one\n\n  two \n', more: 'three', none: '\n', wrong: 'one\nt wo\n' })
  const file = (name: string) => `${folder}/${name}`
  t.match(configFrom(['--api-keys-file', file('keys'), '--read-keys-file', file('more')], { MUOND_API_KEYS: 'zero' }), {
    api_keys: ['zero', 'one', 'two'],
    read_keys: ['three'],
  })
  const cases: [string[], string | RegExp][] = [
    [
      ['--api-keys', 'k'],
      'there is no --api-keys, as everybody can read command lines: use MUOND_API_KEYS or --api-keys-file',
    ],
    [
      ['--read-keys=k'],
      'there is no --read-keys, as everybody can read command lines: use MUOND_READ_KEYS or --read-keys-file',
    ],
    [['--api-keys-file', file('none')], `key file '${file('none')}' has no key`],
    [
      ['--api-keys-file', file('wrong')],
      `line 2 of key file '${file('wrong')}' is no key of letters, digits and . _ ~ + / = -`,
    ],
    [['--read-keys-file', file('nowhere')], /^key file '.*nowhere' cannot be read: ENOENT/],
    [
      ['--api-keys-file', file('keys'), '--read-keys-file', file('keys')],
      'api_keys and read_keys share 2 key(s): a key has one role',
    ],
  ]
  for (const [argv, message] of cases) t.throws(() => readCommand(argv, {}), { name: 'ConfigError', message })
})

t.test('without keys only the loopback is listened on, unless that is said to be meant', async (t) => {
  const refusal = (host: string) => ({
    name: 'ConfigError',
    message: `host is '${host}' and there are no keys: whoever reaches it could do everything. Set MUOND_API_KEYS or --api-keys-file, or --insecure`,
  })
  for (const host of [
    '0.0.0.0',
    '::',
    '10.0.0.1',
    'trainer.local',
    '127.0.0.1.evil.example',
    'localhost.evil.example',
  ]) {
    t.throws(() => configFrom([], { MUOND_HOST: host }), refusal(host))
    t.equal(configFrom(['--host', host, '--insecure']).insecure, true)
    t.equal(configFrom(['--host', host], { MUOND_INSECURE: 'true' }).insecure, true)
    t.equal(configFrom(['--host', host], { MUOND_API_KEYS: 'k' }).insecure, false)
    t.equal(configFrom(['--host', host], { MUOND_READ_KEYS: 'k' }).host, host)
  }
  for (const host of ['localhost', '127.0.0.1', '127.1.2.3', '::1']) t.equal(configFrom(['--host', host]).host, host)
  t.throws(() => configFrom([], { MUOND_INSECURE: 'yes' }), {
    message: "MUOND_INSECURE: must be true or false, got 'yes'",
  })
})

t.test('lists are split at commas, and none of their entries is empty', async (t) => {
  t.same(configFrom(['--allowed-hosts', 'a.example,10.0.0.1']).allowed_hosts, ['a.example', '10.0.0.1'])
  t.throws(() => configFrom(['--allowed-origins', 'http://a.example, http://b.example']), {
    message:
      "--allowed-origins: must be comma-separated, without spaces, none of them empty, got 'http://a.example, http://b.example'",
  })
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
    const flag = 'secret' in setting ? '' : `--${name.replaceAll('_', '-')}`
    const variable = `MUOND_${name.toUpperCase()}`
    const line = lines.find((line) => new RegExp(`^${flag} +${variable} `).test(line)) ?? ''
    for (const part of [String(setting.default), setting.description]) t.ok(line.includes(part), `${variable}: ${part}`)
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
