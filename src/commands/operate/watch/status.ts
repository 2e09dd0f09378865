import { ConfigError, type Environment, readArguments } from '../../../config.js'
import { type Align, tableLines } from '../../../text-table.js'
import { amount, counted, duration } from '../../amount.js'
import { serviceOf } from '../../rest.js'
import { fittedLines } from './columns.js'
import { DURABLE, LAST_STEP, MEMBERS, NAME, STATE, STATUS, STEP, STEP_RATE } from './runs.js'
import { type Survey, survey } from './survey.js'

const HELP = `muond status [URL] [--json] [--token-file FILE]

One look at a service: whether it accepts steps, its device, how full it is, and
its runs. Ends with 0 where it accepts steps, else with 1.

  URL                default http://127.0.0.1:8787; that of a trainer (ws://…)
                     does too, and a Unix socket: ws+unix:///run/muond.sock
  --json             Prints the same as JSON
  --token-file FILE  Holds a key, scope read; also the variable MUOND_TOKEN. One
                     for all runs is told how full the service is, any other one
                     how full its quotas are
  --help             Prints this`

/** Something that a service or a key has so much of, and may have so much of. */
type Limit = { readonly name: string; readonly used: number; readonly limit: number; readonly unit?: 'B' }

/**
 * `muond status`: returns the text to print, in lines of at most `width` characters. `failed` is called where the
 * service accepts no steps. Throws ConfigError where it cannot be reached, or refuses the key.
 */
export async function statusCommand(
  argv: readonly string[],
  env: Environment,
  { width, failed }: { width?: number | undefined; failed: () => void },
): Promise<string> {
  const types = { json: 'boolean', 'token-file': 'string', help: 'boolean' } as const
  const { values, positionals } = readArguments(argv, types)
  if (values.help) return HELP
  const [url, ...more] = positionals
  if (more.length > 0) throw new ConfigError('status takes one URL (--help says more)')
  const service = serviceOf({ ...values, ...(url !== undefined && { url }) }, env, 'the URL')
  const found = await survey(service)
  if (found.unready !== undefined) failed()
  return values.json ? jsonOf(service.url, found) : textOf(service.url, found, width)
}

/** The first line about a service: `muond 0.1.0 at http://…: ready, up 3 h`. */
export function titleOf(url: string, { capabilities: { server }, unready, ...rest }: Survey): string {
  const uptime = uptimeOf(rest)
  const up = uptime === undefined ? '' : `, up ${duration(uptime)}`
  return `muond ${server.version} at ${url}: ${unready === undefined ? 'ready' : 'NOT READY'}${up}`
}

/** Seconds since the service was started; undefined where the key may not know. */
function uptimeOf({ samples, now }: Pick<Survey, 'samples' | 'now'>): number | undefined {
  const started = samples?.get('muond_process_start_time_seconds')
  return started === undefined ? undefined : Math.max(0, now / 1000 - started)
}

function limitsOf({ samples, capabilities: { quotas } }: Survey): Limit[] {
  const sample = (name: string) => samples?.get(`muond_${name}`)
  const of = (name: string, unit?: 'B'): Limit[] => {
    const [used, limit] = [sample(name), sample(`${name}_limit`)]
    return used === undefined || limit === undefined
      ? []
      : [{ name: WORDS[name] ?? name, used, limit, ...(unit && { unit }) }]
  }
  const [staging, capacity] = ['used', 'capacity'].map((state) => sample(`staging_bytes{state="${state}"}`))
  const own = Object.entries(quotas).flatMap(([name, { used, quota }]): Limit[] => {
    const unit = name.includes('bytes') ? 'B' : undefined
    return quota === undefined
      ? []
      : [{ name: `quota of ${WORDS[name] ?? name}`, used, limit: quota, ...(unit && { unit }) }]
  })
  return [
    ...['runs', 'connections', 'sockets'].flatMap((name) => of(name)),
    ...of('state_bytes', 'B'),
    ...(staging === undefined || capacity === undefined
      ? []
      : [{ name: 'staging', used: staging, limit: capacity, unit: 'B' } as const]),
    ...of('unfinished_bytes', 'B'),
    ...own,
  ]
}

const WORDS: Readonly<Record<string, string>> = {
  state_bytes: 'state',
  unfinished_bytes: 'unfinished messages',
  bytes_per_second: 'bytes per second',
}

function jsonOf(url: string, found: Survey): string {
  const { capabilities, unready, runs, stored } = found
  const { server, devices } = capabilities
  const service = { url, version: server.version, ready: unready === undefined, ...(unready && { reason: unready }) }
  const [limits, uptime_seconds] = [limitsOf(found), uptimeOf(found)]
  return JSON.stringify({ ...service, uptime_seconds, devices, limits, runs, stored }, null, 2)
}

function textOf(url: string, found: Survey, width?: number): string {
  const { capabilities, unready, runs, stored } = found
  const devices = capabilities.devices.map(
    ({ name, onnxruntime, lanes }) => `${name}, ONNX Runtime ${onnxruntime}, ${counted(lanes, 'lane')}`,
  )
  const absent = stored.map(({ name, status, detail }) => [`run ${name}`, status, detail].filter(Boolean).join(': '))
  const sections = [
    [titleOf(url, found), ...(unready === undefined ? [] : [unready]), ...devices],
    limitLines(limitsOf(found)),
    runs.length === 0 ? ['no runs'] : fittedLines(runs, COLUMNS, width),
    absent,
  ]
  return sections
    .filter((lines) => lines.length > 0)
    .map((lines) => lines.join('\n'))
    .join('\n\n')
}

const COLUMNS = [NAME, STATUS, STEP, STEP_RATE, STATE, MEMBERS, LAST_STEP, DURABLE]
const LIMIT_ALIGN: readonly Align[] = ['left', 'right', 'right', 'right']

function limitLines(limits: readonly Limit[]): string[] {
  if (limits.length === 0) return []
  const rows = limits.map(({ name, used, limit, unit }) => {
    const [has, most] = [used, limit].map((value) => (unit === undefined ? String(value) : amount(value, unit)))
    return [name, has, most, `${Math.round((100 * used) / limit)} %`]
  })
  return tableLines({ head: ['limit', 'used', 'of', 'full'], align: LIMIT_ALIGN, rows })
}
