import { fork } from 'node:child_process'
import { once, setMaxListeners } from 'node:events'
import { mkdtempSync, writeFileSync } from 'node:fs'
import { availableParallelism, cpus, loadavg, tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { startService } from '../../examples/service.js'
import { hashOf, newKey } from '../../src/access/key-file.js'
import { tableLines } from '../../src/text-table.js'
import { ATTACKS, type Attack, SETTINGS, type Tried } from './attacks.js'
import type { Seen, Watched } from './bystander.js'

const USAGE = `npm run attack [-- --only TEXT --seconds N --quick --server FILE]

Attacks a service of its own on the loopback, each time a new one, while a bystander trains there and asks for /livez. Every other
round goes to a decoy, another service beside it: it takes the machine as much, and tells how fast the bystander trains undisturbed.
Prints what was tried, the load of the machine, the service's memory before, at most and after, the slowest /livez and the bystander's
steps a second, each alone (right before), while the decoy and while its service was attacked, and how much slower it trained than
in the rounds against the decoy, by the medians. Ends with 1 where memory grows by more than 100 MB beyond what the settings
allow, /livez takes more than 250 ms, the bystander is more than 1.2 times as slow, or loses a step, and where an attack was given more
than it may be given. What the rounds against the decoy show of the machine itself comes on top: their slowest /livez, and how much
they differ. With --quick memory, lost steps and what was given are judged alone: it is for machines that do other things meanwhile.

--only TEXT    attacks whose name has this text
--seconds N    how long each lasts; default 9
--quick        fewer of them, 3 seconds each
--server FILE  another build's server.js`

const SLACK_BYTES = 100e6
const LIVEZ_MS = 250
const SLOWER = 1.2
const CALM_MS = 1000
const ROUNDS = 3
const [TOKEN, READER] = [newKey(), newKey()]
const PROGRAM = fileURLToPath(new URL('../../src/server.js', import.meta.url))

/** One attack: what the bystander saw alone, in each round against the decoy and against its service, and after. */
type Outcome = {
  attack: Attack
  tried: Tried[]
  load: number
  alone: Seen
  decoyed: Seen[]
  attacked: Seen[]
  after: Seen
}

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
  const seconds = Number(flags.seconds ?? (flags.quick ? 3 : 9))
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

function serve() {
  const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('MUOND_')))
  const reader = { name: 'reader', sha256: hashOf(READER), scopes: ['read'] }
  const file = join(mkdtempSync(join(tmpdir(), 'muond-attack-')), 'keys.yaml')
  writeFileSync(file, JSON.stringify({ keys: [reader] }))
  const keys = { MUOND_API_KEYS: TOKEN, MUOND_KEYS_FILE: file }
  return startService(flags.server, {
    args: ['--device', 'cpu', '--lanes', '1', '--threads', '1', '--log-level', 'info'],
    env: { ...env, ...SETTINGS, ...keys },
  })
}

async function carryOut(attack: Attack, seconds: number): Promise<Outcome> {
  const [service, decoy] = await Promise.all([serve(), serve()])
  const watched: Watched = { url: service.url, pid: service.pid, token: TOKEN }
  const bystander = fork(fileURLToPath(new URL('./bystander.js', import.meta.url)), [JSON.stringify(watched)])
  const report = async (): Promise<Seen> => {
    bystander.send('report')
    const [seen] = await once(bystander, 'message')
    return seen
  }
  const round = async ({ url }: { url: string }) => {
    const length = Math.max(seconds / ROUNDS, attack.leastSeconds ?? 0)
    const signal = AbortSignal.timeout(length * 1000)
    setMaxListeners(0, signal)
    await report()
    return {
      tried: await attack.attack({ url, token: TOKEN, reader: READER, signal }),
      seen: await report(),
    }
  }
  await once(bystander, 'message')
  await delay(CALM_MS)
  await report()
  await delay(CALM_MS)
  const alone = await report()
  const outcome: Outcome = {
    attack,
    tried: [],
    load: loadavg()[0] ?? 0,
    alone,
    decoyed: [],
    attacked: [],
    after: alone,
  }
  for (let i = 0; i < ROUNDS; i++) {
    outcome.decoyed.push((await round(decoy)).seen)
    const { tried, seen } = await round(service)
    outcome.tried.push(tried)
    outcome.attacked.push(seen)
  }
  await report()
  await delay(CALM_MS)
  outcome.after = await report()
  bystander.send('stop')
  await once(bystander, 'exit')
  await Promise.all([service.stop(), decoy.stop()])
  return outcome
}

function tableOf(outcomes: readonly Outcome[]) {
  const head = ['attack', 'tried in a round', 'load', 'RSS before', 'at most', 'after', 'allowed', '/livez alone']
  const more = ['decoy attacked', 'attacked', 'steps/s alone', 'decoy attacked', 'attacked', 'slower', 'bounds']
  const rows = outcomes.map((outcome) => {
    const { attack, tried, load, alone, decoyed, attacked, after } = outcome
    const most = Math.max(...attacked.map((seen) => seen.most))
    const sizes = [rssBefore(outcome), most, after.rss, attack.allowed].map((bytes) => `${(bytes / 1e6).toFixed(0)} MB`)
    const livez = [[alone], decoyed, attacked].map((rounds) => `${slowestLivez(rounds).toFixed(0)} ms`)
    const paces = [[alone], decoyed, attacked].map((rounds) => median(rounds.map(paceOf)).toFixed(0))
    const held = faultsOf(outcome).length === 0 ? 'hold' : 'BROKEN'
    const slower = `${slowerBy(outcome).toFixed(2)}x`
    return [attack.name, tried.at(-1)?.text ?? '', load.toFixed(1), ...sizes, ...livez, ...paces, slower, held]
  })
  const align = [...head, ...more].map((_, column) => (column < 2 ? 'left' : 'right')) satisfies ('left' | 'right')[]
  return { head: [...head, ...more], rows, align }
}

/** The most memory before the first round against the service: it grows while a bystander begins to train. */
function rssBefore({ alone, decoyed: [first] }: Outcome): number {
  return Math.max(alone.rss, first?.most ?? 0)
}

/** How many times as long a step took as while the decoy was attacked. */
function slowerBy({ decoyed, attacked }: Outcome): number {
  return median(decoyed.map(paceOf)) / median(attacked.map(paceOf))
}

function slowestLivez(rounds: readonly Seen[]): number {
  return Math.max(...rounds.map(({ livezMs }) => livezMs))
}

/** Steps in a second. */
function paceOf({ steps, seconds }: Seen): number {
  return steps / seconds
}

function median(numbers: readonly number[]): number {
  const sorted = [...numbers].sort((a, b) => a - b)
  const half = sorted.length / 2
  return ((sorted[Math.ceil(half) - 1] ?? 0) + (sorted[Math.floor(half)] ?? 0)) / 2
}

function faultsOf(outcome: Outcome): string[] {
  const { attack, tried, decoyed, attacked, after } = outcome
  const grown = Math.max(...attacked.map(({ most }) => most)) - rssBefore(outcome) - attack.allowed
  const livezMs = slowestLivez(attacked)
  const slower = slowerBy(outcome)
  const paces = decoyed.map(paceOf)
  const [mostMs, mostSlower] = [LIVEZ_MS + slowestLivez(decoyed), (SLOWER * Math.max(...paces)) / Math.min(...paces)]
  const judgesTime = !flags.quick
  const faults = tried.flatMap(({ faults }) => faults ?? [])
  if (grown > SLACK_BYTES)
    faults.push(`memory grew by ${(grown / 1e6).toFixed(0)} MB beyond what is allowed, at most 100 MB`)
  if (judgesTime && livezMs > mostMs)
    faults.push(`/livez took ${livezMs.toFixed(0)} ms, at most ${mostMs.toFixed(0)} ms`)
  if (judgesTime && slower > mostSlower)
    faults.push(`the bystander was ${slower.toFixed(2)} times as slow, at most ${mostSlower.toFixed(2)}`)
  if (after.problem !== '') faults.push(`the bystander met ${after.problem}`)
  if (after.steps === 0) faults.push('the bystander trains no more')
  return faults.map((fault) => `${attack.name}: ${fault}`)
}
