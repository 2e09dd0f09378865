import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { availableParallelism, cpus, loadavg } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { type Entry, EXAMPLES } from './catalog.js'
import { progressBar } from './progress.js'
import type { Stage } from './stage.js'
import { readCorpus } from './text.js'

const NAMES = [...EXAMPLES.keys()]

const USAGE = `npm run examples [-- NAME… --quick --out docs/examples --tables FILE]

Measures what is claimed of Muon on a small transformer that learns this repository's own sources through the service.
NAME is one of ${NAMES.join(', ')}; without any, all of them run. Each leaves NAME.json and NAME.svg in --out and prints
its table, which --tables also puts between <!-- NAME --> and <!-- /NAME --> of FILE. --quick shows how it runs, in seconds.`

const ROOT = fileURLToPath(new URL('../../', import.meta.url))
const SERVER = fileURLToPath(new URL('../src/server.js', import.meta.url))

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    out: { type: 'string', default: 'docs/examples' },
    tables: { type: 'string' },
    quick: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
})

const SIZE = (['full', 'quick'] as const)[Number(options.quick)]

if (options.help) console.log(USAGE)
else await main()

async function main(): Promise<void> {
  const unknown = positionals.find((name) => !EXAMPLES.has(name))
  if (unknown !== undefined)
    throw new RangeError(`there is no example '${unknown}', expected one of ${NAMES.join(', ')}`)
  const chosen = [...EXAMPLES].filter(([name]) => positionals.length === 0 || positionals.includes(name))
  // What is wrong with that file must not show after minutes of measuring.
  for (const [name] of chosen) if (options.tables !== undefined) section(options.tables, name)
  const stage: Stage = { server: SERVER, corpus: readCorpus(ROOT), bar: progressBar }
  mkdirSync(options.out, { recursive: true })
  for (const [name, entry] of chosen) await run(name, entry, stage)
}

async function run(name: string, entry: Entry, stage: Stage): Promise<void> {
  const machine = describeMachine()
  const started = performance.now()
  const results = await entry.measure(stage, SIZE)
  const seconds = Math.round((performance.now() - started) / 1000)
  const { table, svg } = entry.show(results)
  const [json, picture] = ['json', 'svg'].map((kind) => join(options.out, `${name}.${kind}`))
  writeFileSync(json, `${JSON.stringify({ machine, seconds, results })}\n`)
  writeFileSync(picture, svg)
  if (options.tables !== undefined) writeFileSync(options.tables, section(options.tables, name).join(`${table}\n`))
  console.log(`\n${name}, ${seconds} s\n\n${table}\n\n${json}, ${picture}\n`)
}

/** The text of a file before and after a section's content. */
function section(file: string, name: string): [before: string, after: string] {
  const [open, close] = [`<!-- ${name} -->\n`, `<!-- /${name} -->`]
  const text = readFileSync(file, 'utf8')
  const [from, to] = [text.indexOf(open), text.indexOf(close)]
  if (from < 0 || to < from) throw new Error(`${file} has no section ${open.trim()} … ${close}`)
  return [text.slice(0, from + open.length), text.slice(to)]
}

function describeMachine() {
  const [load] = loadavg()
  const cores = availableParallelism()
  return { date: new Date().toISOString(), cpu: cpus()[0].model, cores, load_before: load, node: process.version }
}
