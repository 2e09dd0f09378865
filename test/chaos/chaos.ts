import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { availableParallelism, cpus, loadavg, tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { parseArgs } from 'node:util'
import { progressBar } from '../../examples/progress.js'
import { clock } from './clock.js'
import { fullDisk } from './full-disk.js'
import { goingBack } from './going-back.js'
import { kills } from './kills.js'
import { network } from './network.js'
import { readOnly } from './read-only.js'
import { servers } from './servers.js'
import { shards } from './shards.js'
import { carryOut, type Failure, type Fault, type Reference } from './stage.js'
import { stopped } from './stopped.js'
import { markdown, type Row } from './table.js'
import { torn } from './torn.js'
import { referenceOf, undisturbed } from './undisturbed.js'

const USAGE = `npm run chaos [-- --only NAME --seed N --runs N --jobs N --quick --out FILE]

Does to real services and clients what happens to them in the end: kills, full disks, torn writes, stopped processes, bad networks,
clocks that jump, a second service. Every run has to end with the weights and the digest of one that nothing disturbs, or with an
explicit error after which it does. Prints a table; --out writes it as JSON, by default bench/results/chaos.json after a whole run.

--only NAME   one group: none, kill, storage, torn, stop, network, clock, servers, shards
--seed N      decides where everything falls; default 1
--runs N      training runs that are killed with a journal, and a third as many without; default 200
--jobs N      rows of the table that are worked on at a time; default 2
--quick       one case of the most telling rows and few of the torn files, in about a minute on an idle machine`

type Chosen = { runs: number; quick: boolean; folder: string }

/** The faults by the names that `--only` takes. */
const GROUPS: Readonly<Record<string, (chosen: Chosen) => Fault[]>> = {
  none: undisturbed,
  kill: ({ runs }) => [...kills({ journal: runs, checkpoint: Math.ceil(runs / 3) }), ...goingBack()],
  storage: ({ folder }) => [...fullDisk(folder), ...readOnly(folder)],
  torn: ({ folder, quick }) => torn(folder, quick),
  stop: stopped,
  network,
  clock,
  servers,
  shards,
}
const RESULTS = new URL('../../../bench/results/chaos.json', import.meta.url)

const { values: flags } = parseArgs({
  options: {
    only: { type: 'string' },
    seed: { type: 'string', default: '1' },
    runs: { type: 'string', default: '200' },
    jobs: { type: 'string', default: '2' },
    quick: { type: 'boolean', default: false },
    out: { type: 'string' },
    help: { type: 'boolean', default: false },
  },
})

if (flags.help) console.log(USAGE)
else await main()

async function main(): Promise<void> {
  const [seed, runs, jobs] = [flags.seed, flags.runs, flags.jobs].map(whole)
  const folder = mkdtempSync(join(tmpdir(), 'muond-chaos-'))
  // A service that does not run as root needs access to its data.
  chmodSync(folder, 0o755)
  const faults = chosen({ runs, quick: flags.quick, folder })
  const machine = describeMachine()
  const started = performance.now()
  const reference = await referenceOf(join(folder, 'reference'))
  const found = await carryOutAll(faults, { folder, seed, reference, jobs })
  const seconds = Math.round((performance.now() - started) / 1000)
  const rows = found.map(({ row }) => row)
  const failures = found.flatMap(({ failures }) => failures)
  console.log(`\n${markdown(rows)}\n\nseed ${seed}, ${seconds} s`)
  const sum = (key: 'count' | 'lost') => rows.reduce((total, row) => total + row[key], 0)
  const out = flags.out ?? (flags.quick || flags.only !== undefined ? undefined : RESULTS)
  if (out) write(out, { machine, seed, seconds, rows, failures })
  conclude(failures, folder)
  console.log(`${sum('count') - sum('lost')} passed, ${sum('lost')} failed`)
}

function whole(text: string): number {
  const value = Number(text)
  if (Number.isSafeInteger(value) && value > 0) return value
  throw new RangeError(`'${text}' is no whole number above 0`)
}

function chosen(options: Chosen): Fault[] {
  const { only } = flags
  const names = Object.keys(GROUPS).filter((name) => only === undefined || name === only)
  const isChosen = ({ isQuick }: Fault) => isQuick || !options.quick
  if (names.length > 0) return names.flatMap((name) => GROUPS[name](options)).filter(isChosen)
  throw new RangeError(`there is no group '${only}', expected one of ${Object.keys(GROUPS).join(', ')}`)
}

type Means = { folder: string; seed: number; reference: Reference; jobs: number }

/** Runs a few rows at a time, and returns the results in the order of the rows. */
async function carryOutAll(
  faults: readonly Fault[],
  { jobs, ...stage }: Means,
): Promise<{ row: Row; failures: Failure[] }[]> {
  const counts = faults.map(({ full }) => (flags.quick ? Math.min(full, 1) : full))
  const bar = progressBar(
    'chaos',
    counts.reduce((sum, count) => sum + count, 0),
  )
  let cases = 0
  const done = ({ fault, aimed }: Fault) => bar(++cases, `${fault}: ${aimed}`)
  const found: { row: Row; failures: Failure[] }[] = []
  const waiting = [...faults.keys()]
  const work = async () => {
    for (let i = waiting.shift(); i !== undefined; i = waiting.shift())
      found[i] = await carryOut({ ...stage, done }, faults[i], counts[i])
  }
  await Promise.all(Array.from({ length: jobs }, work))
  return found
}

function write(out: string | URL, results: object): void {
  if (typeof out === 'string') mkdirSync(dirname(out), { recursive: true })
  writeFileSync(out, `${JSON.stringify(results, null, 2)}\n`)
}

/** Prints the failures. Their folders stay, with the service's log; without a failure all folders are removed. */
function conclude(failures: readonly Failure[], folder: string): void {
  if (failures.length === 0) return rmSync(folder, { recursive: true })
  process.exitCode = 1
  for (const { fault, aimed, seed, reason, folder } of failures)
    console.error(`\nFAILED ${fault}: ${aimed}, seed ${seed}\n  ${reason}\n  ${folder}`)
}

function describeMachine() {
  const [load] = loadavg()
  const cores = availableParallelism()
  return { date: new Date().toISOString(), cpu: cpus()[0].model, cores, load_before: load, node: process.version }
}
