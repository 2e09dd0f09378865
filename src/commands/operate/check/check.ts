import {
  type Config,
  type Environment,
  type Examined,
  examine,
  type SettingName,
  unknownVariables,
} from '../../../config.js'
import { foldText, shorten, tableLines } from '../../../text-table.js'
import { counted } from '../../amount.js'
import { checkPort, checkSocket } from './address.js'
import { checkCluster } from './cluster.js'
import { checkData } from './data.js'
import { checkDevice } from './device.js'
import { checkKeys, checkPresets, checkTls } from './files.js'
import { type Finding, failure, ok, type State, warning } from './finding.js'

const HELP = `muond check [--flag value]… [--json]

Says what \`muond serve\` with the same flags and variables would meet: settings,
device, data folder with its runs, port and socket, keys, certificates,
presets, and the other processes of a cluster. Everything is looked at, whatever is wrong with the rest. The device
computes once; of each run what a start reads is held against its hashes.

Nothing is changed, and no lock is taken: a service may be running. One block is
written to the data folder, and removed.

  ok       as it should be
  warning  a start succeeds, or fails only because a service is running already
  error    a start fails, or goes on without a run

Ends with 1 where there is an error, else with 0.

  --json  Prints the same as JSON: checks, each with check, state, found, remedy
  --help  Prints this; \`muond --help\` has the flags`

/** The checks, in their order, and the settings that each of them is about. */
const CHECKS: readonly { about: readonly SettingName[]; look: (config: Config) => Promise<Finding[]> }[] = [
  { about: ['device', 'onnxruntime_dir', 'threads', 'state_bytes_limit'], look: checkDevice },
  { about: ['data', 'durability', 'journal_bytes'], look: checkData },
  { about: ['host', 'port'], look: checkPort },
  { about: ['socket'], look: async (config) => (config.socket === '' ? [] : checkSocket(config)) },
  { about: ['api_keys', 'keys_file'], look: checkKeys },
  { about: ['tls_cert', 'tls_key', 'tls_client_ca'], look: (config) => checkTls(config, Date.now()) },
  { about: ['presets'], look: checkPresets },
  { about: ['peers', 'advertise', 'cluster_key', 'cluster_key_file'], look: checkCluster },
]

/**
 * `muond check`: returns the text to print, a table in lines of at most `width` characters, or JSON. `failed` is called
 * where there is an error.
 */
export async function checkCommand(
  argv: readonly string[],
  env: Environment,
  { width, failed }: { width?: number | undefined; failed: () => void },
): Promise<string> {
  const examined = examine(argv, env, { json: 'boolean' })
  if (examined.flags.help) return HELP
  const findings = await findingsOf(examined, env)
  if (findings.some(({ state }) => state === 'error')) failed()
  if (examined.flags.json) return JSON.stringify({ checks: findings }, null, 2)
  return [...linesOf(findings, width), '', summaryOf(findings)].join('\n')
}

async function findingsOf(examined: Examined, env: Environment): Promise<Finding[]> {
  const findings = settingsOf(examined, unknownVariables(env))
  for (const { about, look } of CHECKS) {
    // Of a setting that is wrong there is no value to look at.
    if (about.some((name) => examined.wrong.has(name))) continue
    findings.push(...(await look(examined.config)))
  }
  return findings
}

/** Some problems end with what to do: `…. Give --keys-file …`. Those of flags refer to the help of `muond`. */
const REMEDY = /^(.*?)(?:\. Give (.*)| \(--help lists the flags\))$/

function settingsOf({ given, problems }: Examined, unknown: readonly string[]): Finding[] {
  const remedy = 'muond --help has every flag and variable'
  const wrong = problems.map((problem) => {
    const [, found, own = remedy] = REMEDY.exec(problem) ?? [problem, problem]
    return failure('settings', found, own)
  })
  const misspelt = unknown.map((name) => warning('settings', `${name} is set, and no setting of muond`, remedy))
  if (wrong.length > 0 || misspelt.length > 0) return [...wrong, ...misspelt]
  return [ok('settings', given.length === 0 ? 'the defaults' : given.join(', '))]
}

const HEAD = ['check', 'state', 'found']
const ALIGN = ['left', 'left', 'left'] as const
const MOST_NAME_COLUMNS = 28
/** What was found is folded to the width of the terminal, and never to fewer columns. */
const LEAST_COLUMNS = 24
const GAPS = 4

function linesOf(findings: readonly Finding[], width = Number.POSITIVE_INFINITY): string[] {
  const names = findings.map(({ check }) => shorten(check, MOST_NAME_COLUMNS))
  const columns =
    width - GAPS - longest(['check', ...names]) - longest(['state', ...findings.map(({ state }) => state)])
  const rows = findings.flatMap(({ state, found, remedy }, i) => {
    const lines = [found, ...(remedy === undefined ? [] : [`→ ${remedy}`])]
    const [first, ...more] = lines.flatMap((line) => foldText(line, Math.max(LEAST_COLUMNS, columns)))
    return [[names[i], state, first], ...more.map((line) => ['', '', line])]
  })
  return tableLines({ head: HEAD, align: ALIGN, rows })
}

function longest(texts: readonly string[]): number {
  return Math.max(...texts.map(({ length }) => length))
}

function summaryOf(findings: readonly Finding[]): string {
  const of = (state: State) => findings.filter((finding) => finding.state === state).length
  return `${counted(of('error'), 'error')}, ${counted(of('warning'), 'warning')}, ${of('ok')} ok`
}
