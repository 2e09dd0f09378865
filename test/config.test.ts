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

const LONG = 'sixteen-letters-1'

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
  t.match(configFrom([], { MUOND_API_KEYS: `${LONG},${LONG}-2` }), { api_keys: [LONG, `${LONG}-2`] })
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
    [
      ['--port', '--host'],
      {},
      "Option '--port' is followed by another: write --port=… if that is its value (--help lists the flags)",
    ],
    [['--insecure-no-tls=yes'], {}, "Option '--insecure-no-tls' takes no value (--help lists the flags)"],
    [['-x'], {}, "Unknown option '-x' (--help lists the flags)"],
    [['--tls-cert', 'c'], {}, 'tls_cert and tls_key go together: only one of them is given'],
    [['--tls-key', 'k'], {}, 'tls_cert and tls_key go together: only one of them is given'],
    [['--tls-client-ca', 'c'], {}, 'tls_client_ca needs tls_cert and tls_key'],
  ]
  for (const [argv, env, message] of cases) t.throws(() => readCommand(argv, env), new ConfigError(message), message)
})

t.test('all that is wrong is told at once', async (t) => {
  const attempt = () =>
    readCommand(['--prot', '1', '--port', 'x', '--threads', '-3', '--lanes=999', '--tls-key', 'k'], {
      MUOND_HOST: '0.0.0.0',
      MUOND_CHUNK_BYTES: '1',
    })
  const told = [
    /^Unknown option '--prot'/,
    /^Option '--threads' is followed by another/,
    /^--port: must be integer, got 'x'$/,
    /^--lanes: must be <= 256, got '999'$/,
    /^MUOND_CHUNK_BYTES: must be >= 4, got '1'$/,
    /^tls_cert and tls_key go together/,
    /^host is '0\.0\.0\.0' and there are no keys/,
    /^host is '0\.0\.0\.0' and there is no TLS/,
  ]
  try {
    attempt()
    t.fail('it is refused')
  } catch (error) {
    const lines = (error as Error).message.split('\n')
    t.equal(lines.length, told.length, lines.join('\n'))
    for (const line of told)
      t.ok(
        lines.some((text) => line.test(text)),
        String(line),
      )
  }
})

t.test('a list with an empty key or a short one is refused, and no key is printed', async (t) => {
  for (const list of [
    ',',
    `${LONG},`,
    `,${LONG}`,
    `${LONG},,${LONG}`,
    `${LONG} key`,
    ' ',
    'secret',
    'fifteen-letters',
  ]) {
    const attempt = () => readCommand([], { MUOND_API_KEYS: list })
    t.throws(
      attempt,
      { message: /^MUOND_API_KEYS: must be comma-separated keys of at least 16 .* got another value$/ },
      JSON.stringify(list),
    )
  }
})

t.test('no key comes from a command line, which everybody can read, and none is printed', async (t) => {
  const refusal = 'there is no --api-keys, as everybody can read command lines: use MUOND_API_KEYS or --keys-file'
  for (const argv of [['--api-keys', LONG], [`--api-keys=${LONG}`]]) {
    t.throws(() => readCommand(argv, {}), { name: 'ConfigError', message: refusal })
  }
  for (const argv of [['--api-kyes', LONG], ['--api-keys', `-${LONG}`], [`--api-keyz=${LONG}`]]) {
    try {
      readCommand(argv, {})
      t.fail(argv.join(' '))
    } catch (error) {
      t.notMatch((error as Error).message, LONG)
    }
  }
})

t.test('beyond the loopback there are keys and TLS, unless it is said to be meant', async (t) => {
  const keys =
    'there are no keys: whoever reaches it could do everything. Give --keys-file (muond keys add), or --insecure-no-keys'
  const tls =
    'there is no TLS: whoever is on the way could read keys and gradients. Give --tls-cert and --tls-key, or --insecure-no-tls, behind a proxy that has TLS'
  const withTls = ['--tls-cert', 'c', '--tls-key', 'k']
  for (const host of [
    '0.0.0.0',
    '::',
    '10.0.0.1',
    'trainer.local',
    '127.0.0.1.evil.example',
    'localhost.evil.example',
  ]) {
    const told = (argv: string[], env: Record<string, string> = {}) => {
      try {
        configFrom(['--host', host, ...argv], env)
        return []
      } catch (error) {
        return (error as Error).message.split('\n')
      }
    }
    const [noKeys, noTls] = [`host is '${host}' and ${keys}`, `host is '${host}' and ${tls}`]
    t.same(told([]), [noKeys, noTls])
    t.same(told(['--insecure-no-tls']), [noKeys])
    t.same(told(['--insecure-no-keys']), [noTls])
    t.same(told([], { MUOND_API_KEYS: LONG }), [noTls])
    t.same(told(['--keys-file', 'f']), [noTls])
    t.same(told(withTls), [noKeys])
    t.same(told(['--keys-file', 'f', ...withTls]), [])
    t.same(told([...withTls, '--tls-client-ca', 'a']), [], 'a client certificate shows as well who comes')
    t.same(told([], { MUOND_INSECURE_NO_KEYS: 'true', MUOND_INSECURE_NO_TLS: 'true' }), [])
  }
  for (const host of ['localhost', '127.0.0.1', '127.1.2.3', '::1']) t.equal(configFrom(['--host', host]).host, host)
  t.throws(() => configFrom([], { MUOND_INSECURE_NO_KEYS: 'yes' }), {
    message: "MUOND_INSECURE_NO_KEYS: must be true or false, got 'yes'",
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
