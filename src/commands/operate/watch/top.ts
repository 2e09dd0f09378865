import type { EventEmitter } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import { ConfigError, type Environment, type Flags, readArguments } from '../../../config.js'
import { errorText } from '../../../errors.js'
import type { components } from '../../../http/openapi.js'
import { amount, counted, decimal } from '../../amount.js'
import { keepConnections, type ServiceAddress, serviceOf } from '../../rest.js'
import { type Column, fittedLines } from './columns.js'
import { figure, LAST_STEP, MEMBERS, NAME, STATE, STATUS, STEP, STEP_RATE } from './runs.js'
import { type Keyboard, type Output, Screen } from './screen.js'
import { titleOf } from './status.js'
import { newestReceipt, type RunRow, type Survey, survey } from './survey.js'

const HELP = `muond top [URL] [--interval SECONDS] [--count N] [--token-file FILE]

The runs of a service as they train, the fastest first, with the newest receipt
of each: gradient norm, update RMS, and milliseconds of the phases receive,
queue, compute and send, summed over the parameters. q or Ctrl-C ends it. Where
the output is a file or a pipe, each look is a table of its own.

  URL                 default http://127.0.0.1:8787; that of a trainer (ws://…)
                      does too, and a Unix socket: ws+unix:///run/muond.sock
  --interval SECONDS  From one look to the next; default 1, 0.1 at the least
  --count N           Ends after so many looks
  --token-file FILE   Holds a key, scope read; also the variable MUOND_TOKEN
  --help              Prints this`

const LEAST_SECONDS = 0.1
const TYPES = { interval: 'string', count: 'string', 'token-file': 'string', help: 'boolean' } as const

type Receipt = components['schemas']['Receipt']
type TopRow = RunRow & { readonly receipt: Receipt | undefined }

/** A look at a service, and the one before it. */
type Look = { readonly found: Survey; readonly rows: readonly TopRow[]; readonly at: number }

/** Where a command shows what changes. */
export type Terminal = { output: Output; keyboard: Keyboard; signals: Pick<EventEmitter, 'on' | 'off'> }

/**
 * `muond top`: draws until it is told to end, or returns the text of `--help`. Throws ConfigError for its arguments,
 * and where the service cannot be reached at first; one that is lost later is asked again.
 */
export async function topCommand(
  argv: readonly string[],
  env: Environment,
  terminal: Terminal,
): Promise<string | undefined> {
  const { values, positionals } = readArguments(argv, TYPES)
  if (values.help) return HELP
  const [url, ...more] = positionals
  if (more.length > 0) throw new ConfigError('top takes one URL (--help says more)')
  const timing = { seconds: numberOf(values, 'interval', LEAST_SECONDS) ?? 1, count: numberOf(values, 'count', 1) }
  const service = keepConnections(serviceOf({ ...values, ...(url !== undefined && { url }) }, env, 'the URL'))
  try {
    const first = await look(service, undefined)
    if (terminal.output.isTTY) await redraw(service, first, { ...timing, terminal })
    else await print(service, first, { ...timing, terminal })
  } finally {
    service.close()
  }
  return undefined
}

function numberOf(flags: Flags, name: 'interval' | 'count', least: number): number | undefined {
  const given = flags[name]
  if (given === undefined) return undefined
  const value = Number(given)
  if (value >= least && Number.isFinite(value) && given !== '') return value
  throw new ConfigError(`--${name} is '${given}', expected a number from ${least} on`)
}

async function look(service: ServiceAddress, before: Look | undefined): Promise<Look> {
  const found = await survey(service)
  const known = new Map(before?.rows.map((row) => [row.name, row]))
  const rows = await Promise.all(
    found.runs.map(async (run) => ({ ...run, receipt: await receiptOf(service, run, known) })),
  )
  return { found, at: performance.now(), rows: rows.toSorted(byRate) }
}

/** The newest receipt, which is asked for when there is another one. To ask for that of an idle run would wake it. */
function receiptOf(
  service: ServiceAddress,
  run: RunRow,
  known: ReadonlyMap<string, TopRow>,
): Promise<Receipt | undefined> | Receipt | undefined {
  const before = known.get(run.name)
  if (before?.step === run.step && before.epoch === run.epoch) return before.receipt
  return run.connected && run.last_step_seconds !== undefined ? newestReceipt(service, run) : undefined
}

function byRate(one: RunRow, other: RunRow): number {
  return other.step_rate - one.step_rate || (one.name < other.name ? -1 : 1)
}

type Showing = { seconds: number; count: number | undefined; terminal: Terminal }

/** Looks `count` times in all, or until `signal` is aborted. `shown` is told of each look, and of one that failed. */
async function follow(
  service: ServiceAddress,
  first: Look,
  {
    seconds,
    count = Number.POSITIVE_INFINITY,
    signal,
    shown,
  }: Omit<Showing, 'terminal'> & { signal: AbortSignal; shown: Shown },
): Promise<void> {
  let before: Look | undefined
  let last = first
  shown({ last, before })
  for (let looks = 1; looks < count; looks += 1) {
    await delay(seconds * 1000, undefined, { signal }).catch(() => undefined)
    if (signal.aborted) return
    try {
      const next = await look(service, last)
      ;[before, last] = [last, next]
      if (!signal.aborted) shown({ last, before })
    } catch (error) {
      /* c8 ignore next -- a bug */
      if (!(error instanceof ConfigError)) throw error
      shown({ last, before, problem: errorText(error) })
    }
  }
}

type Picture = { last: Look; before: Look | undefined; problem?: string }
type Shown = (picture: Picture) => void

async function redraw(service: ServiceAddress, first: Look, { terminal, ...timing }: Showing): Promise<void> {
  const { output, keyboard, signals } = terminal
  const end = new AbortController()
  const screen = new Screen(output, keyboard, { signals, quit: () => end.abort() })
  try {
    await follow(service, first, {
      ...timing,
      signal: end.signal,
      shown: (picture) => screen.show(({ columns, rows }) => screenLines(service.url, picture, { columns, rows })),
    })
  } finally {
    screen.close()
  }
}

async function print(service: ServiceAddress, first: Look, { terminal, ...timing }: Showing): Promise<void> {
  const { output } = terminal
  const end = new AbortController()
  // Whoever reads the output may stop early, as `head` does.
  const gone = () => end.abort()
  output.on('error', gone)
  const shown = (picture: Picture) => {
    const { last, problem } = picture
    const lines = problem === undefined ? [...headLines(service.url, picture), ...tableOf(last.rows)] : [problem]
    output.write(`${lines.join('\n')}\n\n`)
  }
  await follow(service, first, { ...timing, signal: end.signal, shown })
  output.off('error', gone)
}

/** The lines of a screen: as many runs as there is room for between the head and the last line. */
function screenLines(url: string, picture: Picture, { columns, rows }: { columns: number; rows: number }): string[] {
  const { last, problem } = picture
  const head = [...headLines(url, picture, columns), problem ?? '']
  const room = Math.max(0, rows - head.length - 2)
  const hidden = Math.max(0, last.rows.length - room)
  const foot = hidden > 0 ? `${counted(hidden, 'slower run')} below; q ends` : 'q ends'
  return [...head, ...tableOf(last.rows.slice(0, room), columns), foot]
}

/** The title, and below it as much of what the service does as `width` has room for. */
function headLines(url: string, { last: { found, at }, before }: Picture, width = Number.POSITIVE_INFINITY): string[] {
  const device = found.capabilities.devices.map(({ name }) => name).join(', ')
  const read = ({ samples }: Survey, name: string) => samples?.get(`muond_${name}`) ?? 0
  const rates = () => {
    if (before === undefined) return []
    const perSecond = (name: string) => (1000 * (read(found, name) - read(before.found, name))) / (at - before.at)
    const [received, sent] = ['received', 'sent'].map((way) => amount(perSecond(`${way}_bytes_total`), 'B'))
    return [`${decimal(perSecond('steps_total'))} steps/s`, `gradients ${received}/s`, `updates ${sent}/s`]
  }
  const [state, limit] = ['state_bytes', 'state_bytes_limit'].map((name) => amount(read(found, name), 'B'))
  // A key that is not for all runs is not told what all of them do.
  const all = found.samples === undefined ? [] : [...rates(), `state ${state} of ${limit}`]
  const parts = [device, ...(found.unready === undefined ? [] : [found.unready]), ...all]
  while (parts.length > 1 && parts.join('; ').length > width) parts.pop()
  return [titleOf(url, found), parts.join('; ')]
}

const PHASES = ['receive', 'queue', 'compute', 'send'] as const
const ALL: readonly Column<TopRow>[] = [
  NAME,
  { ...STATUS, rank: 2 },
  STEP,
  STEP_RATE,
  { head: 'grad norm', align: 'right', rank: 6, cell: ({ receipt }) => figure(receipt?.gradient_norm) },
  { head: 'update RMS', align: 'right', rank: 5, cell: ({ receipt }) => figure(receipt?.measured?.update_rms) },
  {
    head: 'phases, ms',
    align: 'right',
    rank: 4,
    cell: ({ receipt }) => (receipt ? PHASES.map((phase) => milliseconds(receipt.seconds[phase])).join(' ') : '–'),
  },
  { ...STATE, rank: 1 },
  { ...MEMBERS, rank: 1 },
  { ...LAST_STEP, rank: 3 },
]

function milliseconds(seconds: number): string {
  /* c8 ignore next -- how long a phase takes is the machine's affair */
  return (1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)
}

function tableOf(rows: readonly TopRow[], width?: number): string[] {
  return rows.length === 0 ? ['no runs'] : fittedLines(rows, ALL, width)
}
