import { once, setMaxListeners } from 'node:events'
import { availableParallelism, cpus, loadavg } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Worker } from 'node:worker_threads'
import { startService } from '../../examples/service.js'
import { tableLines } from '../../src/text-table.js'
import { ATTACKS, type Attack, SETTINGS } from './attacks.js'
import type { Seen, Watched } from './bystander.js'

const USAGE = `npm run attack [-- --only TEXT --seconds N --quick --server FILE]

Attacks a service of its own on the loopback, each time a new one, while a bystander trains there and asks for /livez. Prints what was
tried, the service's memory before, at most and after, the slowest /livez, and how much slower the bystander trained than just before.
Ends with 1 where memory grows by more than 100 MB beyond what the settings allow, /livez takes more than 250 ms, or the bystander loses a step.

--only TEXT    attacks whose name has this text
--seconds N    how long each lasts; default 10
--quick        fewer of them, 3 seconds each
--server FILE  another build's server.js`

const SLACK_BYTES = 100e6
const LIVEZ_MS = 250
const SLOWER = 1.2
const CALM_MS = 1500
const [TOKEN, READER] = ['attack', 'reader']
const PROGRAM = fileURLToPath(new URL('../../src/server.js', import.meta.url))

/** One attack: what the bystander saw before, meanwhile and after it. */
type Outcome = { attack: Attack; tried: string; before: Seen; during: Seen; after: Seen }

const { values: flags } = parseArgs({
  options: {
    only: { type: 'string', default: '' },
    seconds: { type: 'string' },
    quick: { type: 'boolean', default: false },
    server: { type: 'string', default: PROGRAM },
    help: { type: 'boolean', default: false },
  },
})

if (flags.help) console.log(USAGE)
else await main()

async function main(): Promise<void> {
  const seconds = Number(flags.seconds ?? (flags.quick ? 3 : 10))
  const chosen = ATTACKS.filter(({ name, isQuick }) => name.includes(flags.only) && (isQuick || !flags.quick))
  const outcomes: Outcome[] = []
  for (const attack of chosen) {
    process.stderr.write(`${attack.name}\n`)
    outcomes.push(await carryOut(attack, seconds))
  }
  for (const line of tableLines(tableOf(outcomes))) console.log(line)
  const [load] = loadavg()
  console.log(
    `\n${cpus()[0]?.model}, ${availableParallelism()} cores, load ${load?.toFixed(1)}, node ${process.version}`,
  )
  const faults = outcomes.flatMap(faultsOf)
  for (const fault of faults) console.log(fault)
  process.exitCode = faults.length > 0 ? 1 : 0
}

async function carryOut(attack: Attack, seconds: number): Promise<Outcome> {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('MUOND_')))
  const keys = { MUOND_API_KEYS: TOKEN, MUOND_READ_KEYS: READER }
  const service = await startService(flags.server, {
    args: ['--device', 'cpu', '--lanes', '1', '--threads', '1', '--log-level', 'info'],
    env: { ...env, ...SETTINGS, ...keys },
  })
  const watched: Watched = { url: service.url, pid: service.pid, token: TOKEN }
  const bystander = new Worker(new URL('./bystander.js', import.meta.url), { workerData: watched })
  const report = async (): Promise<Seen> => {
    bystander.postMessage('report')
    const [seen] = await once(bystander, 'message')
    return seen
  }
  await delay(CALM_MS)
  await report()
  await delay(CALM_MS)
  const before = await report()
  const signal = AbortSignal.timeout(seconds * 1000)
  setMaxListeners(0, signal)
  const tried = await attack.attack({ url: service.url, token: TOKEN, reader: READER, signal })
  const during = await report()
  await delay(CALM_MS)
  const after = await report()
  bystander.postMessage('stop')
  await once(bystander, 'exit')
  await service.stop()
  return { attack, tried, before, during, after }
}

function tableOf(outcomes: readonly Outcome[]) {
  const head = ['attack', 'tried', 'RSS before', 'at most', 'after', 'allowed', '/livez worst', 'bystander', 'bounds']
  const rows = outcomes.map((outcome) => {
    const { attack, tried, before, during, after } = outcome
    const sizes = [before.rss, during.most, after.rss, attack.allowed].map((bytes) => `${(bytes / 1e6).toFixed(0)} MB`)
    const slower = slowerBy(outcome)
    const pace = `${slower.toFixed(2)}x slower${slower > SLOWER ? ' (!)' : ''}`
    const held = faultsOf(outcome).length === 0 ? 'hold' : 'BROKEN'
    return [attack.name, tried, ...sizes, `${during.livezMs.toFixed(0)} ms`, pace, held]
  })
  const align = head.map((_, column) => (column < 2 ? 'left' : 'right')) satisfies ('left' | 'right')[]
  return { head, rows, align }
}

/** How many times as long a step took as before the attack. */
function slowerBy({ before, during }: Outcome): number {
  return before.steps / before.seconds / (during.steps / during.seconds)
}

function faultsOf({ attack, before, during, after }: Outcome): string[] {
  const grown = during.most - before.rss - attack.allowed
  const faults: string[] = []
  if (grown > SLACK_BYTES)
    faults.push(`memory grew by ${(grown / 1e6).toFixed(0)} MB beyond what is allowed, at most 100 MB`)
  if (during.livezMs > LIVEZ_MS) faults.push(`/livez took ${during.livezMs.toFixed(0)} ms, at most ${LIVEZ_MS} ms`)
  if (after.problem !== '') faults.push(`the bystander met ${after.problem}`)
  if (after.steps === 0) faults.push('the bystander trains no more')
  return faults.map((fault) => `${attack.name}: ${fault}`)
}
